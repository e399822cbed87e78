// attention over a cache in blocks: norms of queries and keys, rotary positions, the write of keys and values, and the
// attention itself. A block of keys is held transposed, [head_width, PANEL], so that both products are panel products.
#include <math.h>

#include "ops.h"
#include "panels.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

// to <- rotary(norm(from)) * scale; weight NULL: no norm.
template <class T>
void prepare(const fssa_attention_args &a, const T *from, const void *weight, int64_t position, float scale, float *to) {
  const int64_t width = a.head_width, half = width / 2;
  for (int64_t d = 0; d < width; d += WIDTH) store_up_to(to + d, load_up_to(from + d, width - d), width - d);
  if (weight) {
    Vec squares = splat(0.0f);
    for (int64_t d = 0; d < width; d += WIDTH) {
      const Vec x = load_up_to(static_cast<const float *>(to) + d, width - d);
      squares = fma(x, x, squares);
    }
    const Vec inverse = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + a.eps));
    for (int64_t d = 0; d < width; d += WIDTH) {
      const Vec w = load_up_to(static_cast<const T *>(weight) + d, width - d);
      store_up_to(to + d, load_up_to(static_cast<const float *>(to) + d, width - d) * inverse * w, width - d);
    }
  }
  const float *cos = a.cos + position * width, *sin = a.sin + position * width;
  const Vec factor = splat(scale);
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

template <class T>
struct Cache {
  const fssa_attention_args &a;
  int64_t block_size;  // elements of a block, all heads

  explicit Cache(const fssa_attention_args &args)
      : a(args), block_size(args.kv_heads * args.head_width * PANEL) {}

  int64_t at(int64_t token, int64_t block, int64_t head) const {
    const int64_t row = a.sequences[token];
    return a.table[row * a.table_stride + block] * block_size + head * a.head_width * PANEL;
  }
  T *keys(int64_t token, int64_t block, int64_t head) const { return static_cast<T *>(a.keys) + at(token, block, head); }
  T *values(int64_t token, int64_t block, int64_t head) const {
    return static_cast<T *>(a.values) + at(token, block, head);
  }
};

template <class T>
void attention_of(const fssa_attention_args &a) {
  const Cache<T> cache(a);
  const int64_t width = a.head_width, group = a.heads / a.kv_heads;
  const Rows<T> q = rows_of(T{}, a.q), k = rows_of(T{}, a.k), v = rows_of(T{}, a.v);
  Scratch scratch;
  float *queries = scratch.floats(a.tokens * a.heads * width);
  parallel(a.tokens * (a.heads + 2 * a.kv_heads) * width < (1 << 15) ? 1 : a.threads, a.tokens, [&](int64_t n) {
    Scratch inner;
    float *row = inner.floats(width), *rounded = inner.floats(width);
    const int64_t position = a.positions[n], block = position / PANEL, within = position % PANEL;
    for (int64_t head = 0; head < a.heads; head++) {
      prepare(a, q(n) + head * width, a.q_norm, position, a.scale, queries + (n * a.heads + head) * width);
    }
    for (int64_t head = 0; head < a.kv_heads; head++) {
      prepare(a, k(n) + head * width, a.k_norm, position, 1.0f, row);
      T *keys = cache.keys(n, block, head) + within, *values = cache.values(n, block, head) + within * width;
      T *key = reinterpret_cast<T *>(rounded);
      for (int64_t d = 0; d < width; d += WIDTH) {
        store_up_to(key + d, load_up_to(static_cast<const float *>(row) + d, width - d), width - d);
      }
      for (int64_t d = 0; d < width; d++) keys[d * PANEL] = key[d];
      memcpy(values, v(n) + head * width, width * sizeof(T));
    }
  });
  parallel(a.threads, a.tokens * a.kv_heads, [&](int64_t task) {
    const int64_t n = task / a.kv_heads, head = task % a.kv_heads;
    const int64_t end = a.positions[n] + 1, begin = a.window ? greater(0, end - a.window) : 0;
    const int64_t first = begin / PANEL, last = (end - 1) / PANEL, span = (last - first + 1) * PANEL;
    Scratch inner;
    // Of every query the scores, from the first block's first position on.
    float *scores = inner.floats(group * span);
    const float *own = queries + (n * a.heads + head * group) * width;
    for (int64_t from = 0; from < group; from += PANEL_ROWS) {
      const int64_t rows = lesser(PANEL_ROWS, group - from);
      float tile[PANEL_ROWS * PANEL];
      const float *points[PANEL_ROWS];
      for (int64_t block = first; block <= last; block++) {
        for (int64_t i = 0; i < rows; i++) points[i] = own + (from + i) * width;
        panel_rows(rows, points, static_cast<const T *>(cache.keys(n, block, head)), PANEL, width, tile, false);
        for (int64_t i = 0; i < rows; i++) {
          memcpy(scores + (from + i) * span + (block - first) * PANEL, tile + i * PANEL, PANEL * sizeof(float));
        }
      }
    }
    const int64_t skipped = begin - first * PANEL, count = end - begin;
    for (int64_t g = 0; g < group; g++) {
      float *row = scores + g * span;
      if (a.softcap > 0) {
        for (int64_t j = skipped; j < skipped + count; j++) row[j] = a.softcap * tanhf(row[j] / a.softcap);
      }
      softmax(row + skipped, count);
    }
    T *out = static_cast<T *>(a.out.data) + n * a.out.stride + head * group * width;
    for (int64_t d = 0; d < width; d += PANEL) {
      const int64_t columns = lesser(PANEL, width - d);
      for (int64_t from = 0; from < group; from += PANEL_ROWS) {
        const int64_t rows = lesser(PANEL_ROWS, group - from);
        float tile[PANEL_ROWS * PANEL];
        const float *points[PANEL_ROWS];
        for (int64_t block = first; block <= last; block++) {
          const int64_t low = block == first ? skipped : 0;
          const int64_t high = lesser(PANEL, end - block * PANEL);
          for (int64_t i = 0; i < rows; i++) points[i] = scores + (from + i) * span + (block - first) * PANEL + low;
          panel_rows(rows, points, static_cast<const T *>(cache.values(n, block, head)) + low * width + d, width,
                     high - low, tile, block > first);
        }
        for (int64_t i = 0; i < rows; i++) {
          for (int64_t j = 0; j < columns; j += WIDTH) {
            store_up_to(out + (from + i) * width + d + j, load(static_cast<const float *>(tile) + i * PANEL + j),
                        columns - j);
          }
        }
      }
    }
  });
}

}  // namespace

void attention(const fssa_attention_args &a) {
  with_type(a.dtype, [&](auto type) { attention_of<decltype(type)>(a); });
}

}  // namespace FSSA_ISA
}  // namespace fssa
