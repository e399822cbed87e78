// attention over a cache in blocks: norms of queries and keys, rotary positions, the write of keys and values, and the
// attention itself.
//
// A block is two panels: of keys, transposed, [head_width][PANEL], and of values, [PANEL][head_width]; of bfloat16 with two
// k side by side, as in panels.h. So both products are panel products, and a block is read once for all heads of a
// group and for all tokens of a tile: neighbours of one sequence, as a prompt has them. A row's bits do not depend on its
// tile: its scores are its own, and what it does not see has the weight 0, which adds nothing to a sum.
#include <math.h>

#include "ops.h"
#include "panels.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

// to <- rotary(norm(from)) * scale; weight NULL: no norm.
template <class T>
void prepare(const fssa_rotary &rotary, int64_t width, const T *from, const void *weight, int64_t position, float scale,
             float *to) {
  const int64_t half = width / 2;
  for (int64_t d = 0; d < width; d += WIDTH) store_up_to(to + d, load_up_to(from + d, width - d), width - d);
  if (weight) {
    Vec squares = splat(0.0f);
    for (int64_t d = 0; d < width; d += WIDTH) {
      const Vec x = load_up_to(static_cast<const float *>(to) + d, width - d);
      squares = fma(x, x, squares);
    }
    const Vec inverse = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + rotary.eps));
    for (int64_t d = 0; d < width; d += WIDTH) {
      const Vec w = load_up_to(static_cast<const T *>(weight) + d, width - d);
      store_up_to(to + d, load_up_to(static_cast<const float *>(to) + d, width - d) * inverse * w, width - d);
    }
  }
  const float *cos = rotary.cos + position * width, *sin = rotary.sin + position * width;
  const Vec factor = splat(scale);
  // Both halves of a stretch at once, since each needs the other's unturned numbers.
  for (int64_t d = 0; d < half; d += WIDTH) {
    const int64_t count = half - d;
    const Vec low = load_up_to(static_cast<const float *>(to) + d, count);
    const Vec high = load_up_to(static_cast<const float *>(to) + half + d, count);
    const Vec turned = fma(low, load_up_to(cos + d, count), splat(0.0f) - high * load_up_to(sin + d, count));
    const Vec other = fma(high, load_up_to(cos + half + d, count), low * load_up_to(sin + half + d, count));
    store_up_to(to + d, turned * factor, count);
    store_up_to(to + half + d, other * factor, count);
  }
}

// scores <- softmax(scores), over `count`.
FSSA_INLINE void softmax(float *scores, int64_t count) {
  Vec highest = splat(-__builtin_inff());
  for (int64_t j = 0; j < count; j += WIDTH) {
    const int64_t n = count - j;
    // A tail joins one score at a time: its missing lanes would count as scores of 0.
    highest = max(highest, n >= WIDTH ? load(static_cast<const float *>(scores) + j) : splat(scores[j]));
    for (int64_t i = 1; i < n && n < WIDTH; i++) highest = max(highest, splat(scores[j + i]));
  }
  const Vec top = splat(largest(highest));
  Vec total = splat(0.0f);
  for (int64_t j = 0; j < count; j += WIDTH) {
    const int64_t n = count - j;
    store_up_to(scores + j, exp_nonpositive(load_up_to(static_cast<const float *>(scores) + j, n) - top), n);
    total = total + load_up_to(static_cast<const float *>(scores) + j, n);
  }
  const Vec inverse = splat(1.0f / sum(total));
  for (int64_t j = 0; j < count; j += WIDTH) {
    const int64_t n = count - j;
    store_up_to(scores + j, load_up_to(static_cast<const float *>(scores) + j, n) * inverse, n);
  }
}

constexpr int64_t TILE_ROWS = 12;  // queries of a tile, about: more would only make their scores leave the cache

template <class T>
struct Cache {
  static constexpr int64_t PAIR = Together<T>::value;
  const fssa_block_cache &cache;
  const int32_t *sequences;
  int64_t width, block_size;  // elements of a block, all heads

  explicit Cache(const fssa_attention_args &a)
      : cache(a.cache), sequences(a.tokens.sequences), width(a.heads.head_width),
        block_size(a.heads.kv_heads * width * PANEL) {}

  int64_t at(int64_t token, int64_t block, int64_t head) const {
    const int64_t row = sequences[token];
    return cache.table[row * cache.table_stride + block] * block_size + head * width * PANEL;
  }
  T *keys(int64_t token, int64_t block, int64_t head) const {
    return static_cast<T *>(cache.keys) + at(token, block, head);
  }
  T *values(int64_t token, int64_t block, int64_t head) const {
    return static_cast<T *>(cache.values) + at(token, block, head);
  }
  void write(int64_t token, int64_t position, int64_t head, const T *key, const T *value) const {
    const int64_t block = position / PANEL, within = position % PANEL;
    // A position is a column of the panel of keys, so that its elements are PANEL apart, and a row of that of values.
    T *keys_at = keys(token, block, head) + within * PAIR;
    for (int64_t d = 0; d < width; d += PAIR) memcpy(keys_at + d * PANEL, key + d, PAIR * sizeof(T));
    T *values_at = values(token, block, head) + within / PAIR * PAIR * width + within % PAIR;
    for (int64_t d = 0; d < width; d++) values_at[d * PAIR] = value[d];
  }
};

// Tokens that attend together: `count` neighbours of one sequence from `first` on, their positions one after the other.
struct Tile {
  int64_t first, count;
};

static int64_t tiles_of(const fssa_tokens &tokens, int64_t most, Tile *tiles) {
  const int32_t *sequences = tokens.sequences, *positions = tokens.positions;
  int64_t count = 0;
  for (int64_t n = 0; n < tokens.count; n++) {
    Tile *last = count ? tiles + count - 1 : nullptr;
    if (last && last->count < most && sequences[n] == sequences[n - 1] && positions[n] == positions[n - 1] + 1) {
      last->count++;
    } else {
      tiles[count++] = {n, 1};
    }
  }
  return count;
}

// One tile's attention with one head of keys and values; queries [tokens][heads][width] as they are multiplied.
template <class T, class X>
void attend(const fssa_attention_args &a, const Cache<T> &cache, const Tile &tile, int64_t head, const X *queries) {
  constexpr int64_t PAIR = Together<T>::value;
  const int64_t width = a.heads.head_width, heads = a.heads.heads, group = heads / a.heads.kv_heads;
  const int64_t rows = tile.count * group, window = a.scores.window;
  const int64_t start = a.tokens.positions[tile.first], end = start + tile.count;  // a token sees up to and with itself
  const int64_t first = (window ? greater(0, start + 1 - window) : 0) / PANEL, last = (end - 1) / PANEL;
  const int64_t span = (last - first + 1) * PANEL, sums_width = (width + PANEL - 1) / PANEL * PANEL;
  Scratch scratch;
  float *part = scratch.floats(rows * PANEL);
  // Of every row the scores, then the weights, from the first block's first position on. All are kept: a
  // row's softmax then sums what the row sees in an order that its tile does not change.
  float *scores = scratch.floats(rows * span);
  // What is multiplied as bfloat16 needs a copy of the weights; else they lie where the scores were.
  X *weights = sizeof(X) == sizeof(float) ? reinterpret_cast<X *>(scores)
                                          : reinterpret_cast<X *>(scratch.floats(rows * span));
  for (int64_t block = first; block <= last; block++) {
    const T *keys = cache.keys(tile.first, block, head);
    // A tile's rows are the group's heads of its tokens: they share the keys, which are read once for all of them.
    for (int64_t d = 0; d < width; d += PANEL_DEPTH) {
      const auto query = [&](int64_t i) {
        return queries + ((tile.first + i / group) * heads + head * group + i % group) * width + d;
      };
      panel_part(query, rows, keys + d * PANEL, PANEL * PAIR, lesser(PANEL_DEPTH, width - d), part, d > 0);
    }
    for (int64_t i = 0; i < rows; i++) {
      memcpy(scores + i * span + (block - first) * PANEL, part + i * PANEL, PANEL * sizeof(float));
    }
  }
  for (int64_t i = 0; i < rows; i++) {
    const int64_t own_end = start + i / group + 1, own_begin = window ? greater(0, own_end - window) : 0;
    const int64_t skipped = own_begin - first * PANEL, count = own_end - own_begin;
    float *row = scores + i * span;
    if (a.scores.softcap > 0) {
      const float cap = a.scores.softcap;
      for (int64_t j = skipped; j < skipped + count; j++) row[j] = cap * tanhf(row[j] / cap);
    }
    // The rest of the span held scores of what the row does not see, or of what was never written: weights of 0.
    softmax(row + skipped, count);
    memset(row, 0, skipped * sizeof(float));
    memset(row + skipped + count, 0, (span - skipped - count) * sizeof(float));
    if constexpr (sizeof(X) != sizeof(float)) {
      for (int64_t j = 0; j < span; j += WIDTH) store(weights + i * span + j, load(static_cast<const float *>(row) + j));
    }
  }
  float *sums = scratch.floats(rows * sums_width);  // in panels of columns: [sums_width / PANEL][rows][PANEL]
  for (int64_t block = first; block <= last; block++) {
    const T *values = cache.values(tile.first, block, head);
    const int64_t depth = lesser(PANEL, end - block * PANEL);  // behind `end` may be NaN, which 0 does not undo
    const auto weight = [&](int64_t i) { return static_cast<const X *>(weights + i * span + (block - first) * PANEL); };
    for (int64_t d = 0; d < width; d += PANEL) {
      panel_part(weight, rows, values + d * PAIR, width * PAIR, depth, sums + d * rows, block > first);
    }
  }
  for (int64_t i = 0; i < rows; i++) {
    T *out = static_cast<T *>(a.out.data) + (tile.first + i / group) * a.out.stride + (head * group + i % group) * width;
    for (int64_t d = 0; d < width; d += WIDTH) {
      const float *from = sums + d / PANEL * PANEL * rows + i * PANEL + d % PANEL;
      store_up_to(out + d, load(from), width - d);
    }
  }
}

template <class T>
void attention_of(const fssa_attention_args &a) {
  using X = typename Multiplied<T>::type;
  const Cache<T> cache(a);
  const int64_t width = a.heads.head_width, heads = a.heads.heads, kv_heads = a.heads.kv_heads, tokens = a.tokens.count;
  const Rows<T> q = rows_of(T{}, a.tokens.q), k = rows_of(T{}, a.tokens.k), v = rows_of(T{}, a.tokens.v);
  Scratch scratch;
  X *queries = reinterpret_cast<X *>(scratch.floats(tokens * heads * width));
  // All keys and values are in the cache before anybody attends: a prompt's tokens see each other's.
  parallel(tokens * (heads + 2 * kv_heads) * width < (1 << 15) ? 1 : a.threads, tokens, [&](int64_t n) {
    Scratch inner;
    float *row = inner.floats(width);
    const auto turned = [&](const T *from, const void *norm, float scale, auto *to) {
      prepare(a.rotary, width, from, norm, a.tokens.positions[n], scale, row);
      for (int64_t d = 0; d < width; d += WIDTH) {
        store_up_to(to + d, load_up_to(static_cast<const float *>(row) + d, width - d), width - d);
      }
    };
    for (int64_t head = 0; head < heads; head++) {
      turned(q(n) + head * width, a.rotary.q_norm, a.scores.scale, queries + (n * heads + head) * width);
    }
    T *key = reinterpret_cast<T *>(inner.floats(width));
    for (int64_t head = 0; head < kv_heads; head++) {
      turned(k(n) + head * width, a.rotary.k_norm, 1.0f, key);
      cache.write(n, a.tokens.positions[n], head, key, v(n) + head * width);
    }
  });
  Tile *tiles = reinterpret_cast<Tile *>(scratch.integers(2 * tokens));
  const int64_t count = tiles_of(a.tokens, greater(1, TILE_ROWS / (heads / kv_heads)), tiles);
  parallel(a.threads, count * kv_heads, [&](int64_t task) {
    attend(a, cache, tiles[task / kv_heads], task % kv_heads, static_cast<const X *>(queries));
  });
}

}  // namespace

void attention(const fssa_attention_args &a) {
  with_type(a.dtype, [&](auto type) { attention_of<decltype(type)>(a); });
}

}  // namespace FSSA_ISA
}  // namespace fssa
