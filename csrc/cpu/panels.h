// Products with weights in panels of PANEL columns, zeros where the last panel is not full.
//
// Packing. The elements of PANEL columns at one k lie side by side: [outputs / PANEL][depth][PANEL]. Of bfloat16 those of
// two k lie together, [outputs / PANEL][ceil(depth / 2)][PANEL][2] with a zero behind an odd depth: what an instruction
// that multiplies pairs takes, and what others split into two vectors with a shift and a mask. The packing depends on the
// dtype alone, so that every instruction set runs what was packed once.
//
// Order. A panel is read once, in order, for all rows of a batch, so that few rows cost what reading the weights costs.
// Each output element is the sum of parts of PANEL_DEPTH products, in order, whatever the number of rows: how rows are
// gathered into tiles is a matter of speed and changes no bit. All tiles take one part of a panel before the next, since a
// part stays in the first cache; where elements have to be made float32, those of a part are made so once for all tiles.
//
// Which code runs. This file is compiled once for every instruction set (CMakeLists.txt: add_instruction_set), and
// dispatch.cpp chooses among them on the machine. Within a set, Multiplied<T> says what a row's elements are multiplied
// as, and with it which panel_tile is taken.
#pragma once

#include "matmul.h"

namespace fssa {
namespace FSSA_ISA {

constexpr int PANEL = 32;
constexpr int PANEL_VECS = PANEL / WIDTH;
constexpr int64_t PANEL_DEPTH = 128;  // 16 KiB of float32: half a first cache
constexpr int64_t COPY_ELEMENTS = 1 << 15;  // of rows to be copied, worth a task of their own
// Tiles as high as the registers allow: rows times PANEL_VECS sums, beside a few for columns and factors.
#if defined(__AVX512F__)
constexpr int PANEL_ROWS = 12;
#elif defined(__AVX2__)
constexpr int PANEL_ROWS = 3;
#else
constexpr int PANEL_ROWS = 1;
#endif

// How many k lie together in a panel of T.
template <class T>
struct Together {
  static constexpr int64_t value = 1;
};
template <>
struct Together<bfloat16> {
  static constexpr int64_t value = 2;
};

// depth, as far as a panel of T goes
template <class T>
FSSA_INLINE int64_t panel_depth(int64_t depth) {
  return (depth + Together<T>::value - 1) / Together<T>::value * Together<T>::value;
}

// What rows are multiplied as with a panel of T: as they are where the instruction set multiplies such pairs, else as float32.
template <class T>
struct Multiplied {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Multiplied<bfloat16> {
  using type = bfloat16;
};
#endif

// Into the second cache: the first holds the part of a panel that is being multiplied.
FSSA_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

// sums[i, j] += x[i][k] * columns[j]
template <int ROWS>
FSSA_INLINE void add_products(
    Vec (&sums)[ROWS][PANEL_VECS], const Vec (&columns)[PANEL_VECS], const float *const *x, int64_t k) {
  FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
    const Vec factor = splat(x[i][k]);
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) sums[i][j] = fma(factor, columns[j], sums[i][j]);
  }
}

// Two bfloat16 of a lane as float32: moved up, the lower is one, and without its lower half the upper is one.
FSSA_INLINE Vec lower_of(Vec pairs) { return (Vec)((Bits)pairs << 16); }
FSSA_INLINE Vec upper_of(Vec pairs) { return (Vec)((Bits)pairs & 0xffff0000u); }
FSSA_INLINE Vec load_lanes(const bfloat16 *p) { return load(reinterpret_cast<const float *>(p)); }

// sums[i, j] += sum_k x[i][k] w[k, j], of which what lies together for one or two k is `stride` elements apart. Meanwhile
// `ahead`, unless null, is brought nearer: a line for every step.
template <int ROWS, class W>
FSSA_INLINE void panel_sums(
    Vec (&sums)[ROWS][PANEL_VECS], const float *const *x, const W *w, int64_t stride, int64_t depth, const char *ahead) {
  for (int64_t k = 0; k < depth; k++, w += stride) {
    Vec columns[PANEL_VECS];
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) columns[j] = load(w + j * WIDTH);
    if (ahead) prefetch(ahead + k * 64);
    add_products(sums, columns, x, k);
  }
}
template <int ROWS>
FSSA_INLINE void panel_sums(
    Vec (&sums)[ROWS][PANEL_VECS], const float *const *x, const bfloat16 *w, int64_t stride, int64_t depth,
    const char *ahead) {
  int64_t k = 0;
  for (; k + 1 < depth; k += 2, w += stride) {
    if (ahead) prefetch(ahead + k / 2 * 64);
    Vec columns[PANEL_VECS];
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) columns[j] = lower_of(load_lanes(w + 2 * j * WIDTH));
    add_products(sums, columns, x, k);
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) columns[j] = upper_of(load_lanes(w + 2 * j * WIDTH));
    add_products(sums, columns, x, k + 1);
  }
  if (k < depth) {
    Vec columns[PANEL_VECS];
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) columns[j] = lower_of(load_lanes(w + 2 * j * WIDTH));
    add_products(sums, columns, x, k);
  }
}
#if defined(__AVX512BF16__)
// Products are exact, sums float32; numbers too small to be normal count as zero.
template <int ROWS>
FSSA_INLINE void panel_sums(
    Vec (&sums)[ROWS][PANEL_VECS], const bfloat16 *const *x, const bfloat16 *w, int64_t stride, int64_t depth,
    const char *ahead) {
  const auto add = [&](__m512bh left, __m512bh right, int64_t k, size_t bytes) __attribute__((always_inline)) {
    FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
      int pair = 0;  // two elements of a row, to every lane by one load
      memcpy(&pair, x[i] + k, bytes);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], factor, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], factor, right);
    }
  };
  int64_t k = 0;
  for (; k + 1 < depth; k += 2, w += stride) {
    if (ahead) prefetch(ahead + k / 2 * 64);
    add(load_pairs(w), load_pairs(w + PANEL), k, 2 * sizeof(bfloat16));
  }
  if (k < depth) {  // what is behind the last element may be anything: neither side's is multiplied
    const __m512i lower = _mm512_set1_epi32(0xffff);
    add((__m512bh)_mm512_and_si512((__m512i)load_pairs(w), lower),
        (__m512bh)_mm512_and_si512((__m512i)load_pairs(w + PANEL), lower), k, sizeof(bfloat16));
  }
}
#endif

// tile[i, j] (+)= sum_k x[i][k] w[k, j]
template <int ROWS, class X, class W>
FSSA_INLINE void panel_tile(
    const X *const *x, const W *w, int64_t stride, int64_t depth, float *tile, bool add, const char *ahead) {
  Vec sums[ROWS][PANEL_VECS] = {};
  panel_sums(sums, x, w, stride, depth, ahead);
  FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) {
      float *to = tile + i * PANEL + j * WIDTH;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

// The same for `rows` rows, at most ROWS: a tile of every height is compiled, its sums in registers.
template <int ROWS = PANEL_ROWS, class X, class W>
static void panel_rows(
    int64_t rows, const X *const *x, const W *w, int64_t stride, int64_t depth, float *tile, bool add, const char *ahead) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return panel_rows<ROWS - 1>(rows, x, w, stride, depth, tile, add, ahead);
  }
  // The null is passed as such: the loop of the tile that fetches nothing is then compiled without the question.
  ahead ? panel_tile<ROWS>(x, w, stride, depth, tile, add, ahead)
        : panel_tile<ROWS>(x, w, stride, depth, tile, add, nullptr);
}

// A part of a panel as float32, [depth][PANEL].
template <class W>
FSSA_INLINE void widen_part(const W *w, int64_t stride, int64_t depth, float *to) {
  for (int64_t k = 0; k < depth; k++, w += stride) {
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) store(to + k * PANEL + j * WIDTH, load(w + j * WIDTH));
  }
}
FSSA_INLINE void widen_part(const bfloat16 *w, int64_t stride, int64_t depth, float *to) {
  for (int64_t k = 0; k < depth; k += 2, w += stride) {
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) {
      const Vec pairs = load_lanes(w + 2 * j * WIDTH);
      store(to + k * PANEL + j * WIDTH, lower_of(pairs));
      if (k + 1 < depth) store(to + (k + 1) * PANEL + j * WIDTH, upper_of(pairs));
    }
  }
}

// sums[m, j] (+)= sum_k x(m)[k] w[k, j] for any number of rows and one part of a panel, depth at most PANEL_DEPTH; of w
// what lies together is `stride` apart. Unless null, as much from `ahead` on is brought nearer meanwhile.
template <class XRows, class W>
static void panel_part(const XRows &x, int64_t rows, const W *w, int64_t stride, int64_t depth, float *sums, bool add,
                       const char *ahead = nullptr) {
  using X = decltype(element_of(x(0)));
  const int64_t tiles = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
  const int64_t lines = panel_depth<W>(depth) * PANEL * static_cast<int64_t>(sizeof(W)) / 64;
  const auto all = [&](const auto *part, int64_t apart, int64_t steps) {
    for (int64_t t = 0; t < tiles; t++) {
      // Tiles of about the same height: 13 rows as 6 and 7, since a last tile of one would be as dear as a full one.
      const int64_t first = t * rows / tiles, height = (t + 1) * rows / tiles - first;
      const X *points[PANEL_ROWS];
      for (int64_t i = 0; i < height; i++) points[i] = x(first + i);
      const bool fetches = ahead && t * steps < lines;  // a line for every step through this part
      panel_rows(height, points, part, apart, depth, sums + first * PANEL, add,
                 fetches ? ahead + t * steps * 64 : nullptr);
    }
  };
  if constexpr (sizeof(W) < sizeof(X)) {
    if (tiles > 1) {
      float wide[PANEL_DEPTH * PANEL];
      widen_part(w, stride, depth, wide);
      return all(static_cast<const float *>(wide), PANEL, depth);
    }
  }
  all(w, stride, panel_depth<W>(depth) / Together<W>::value);
}

// emit(row, column, values, count) takes, for every row m and every panel, values[0 .. count) = (x W)[m, column ..].
template <class X, class W, class Emit>
static void panels(int threads, const Rows<X> &x, int64_t rows, const W *weight, int64_t outputs, int64_t depth,
                   const Emit &emit) {
  constexpr int64_t STRIDE = PANEL * Together<W>::value;
  const int64_t count = (outputs + PANEL - 1) / PANEL, size = panel_depth<W>(depth) * PANEL;
  // Neighbours, of which the next is fetched meanwhile; eight tasks a thread even out what slows one thread down.
  const int64_t together = greater(1, count / (8 * threads));
  parallel(threads, (count + together - 1) / together, [&](int64_t task) {
    Scratch scratch;
    float *sums = scratch.floats(rows * PANEL);
    const int64_t end = lesser(count, (task + 1) * together);
    for (int64_t p = task * together; p < end; p++) {
      const W *panel = weight + p * size;
      // One tile leaves no time between the lines of a panel: the next is then fetched by the machine alone.
      const bool fetches = p + 1 < end && rows > PANEL_ROWS;
      const char *next = reinterpret_cast<const char *>(panel + size);
      for (int64_t k = 0; k < depth || k == 0; k += PANEL_DEPTH) {  // once even without depth: sums are then zeros
        const auto part = [&](int64_t m) { return x(m) + k; };
        panel_part(part, rows, panel + k * PANEL, STRIDE, lesser(PANEL_DEPTH, depth - k), sums, k > 0,
                   fetches ? next + k * PANEL * static_cast<int64_t>(sizeof(W)) : nullptr);
      }
      for (int64_t m = 0; m < rows; m++) {
        emit(m, p * PANEL, static_cast<const float *>(sums + m * PANEL), lesser(PANEL, outputs - p * PANEL));
      }
    }
  });
}

// Rows as they are multiplied with panels of their dtype: where they lie, or a copy in float32.
template <class T>
static Rows<typename Multiplied<T>::type> multiplied(
    Scratch &scratch, int threads, const Rows<T> &x, int64_t rows, int64_t width) {
  if constexpr (sizeof(typename Multiplied<T>::type) == sizeof(T)) {
    return x;
  } else {
    float *copy = scratch.floats(rows * width);
    const int64_t step = greater(1, COPY_ELEMENTS / greater(width, 1));
    parallel(threads, (rows + step - 1) / step, [&](int64_t task) {
      for (int64_t m = task * step; m < lesser(rows, task * step + step); m++) {
        for (int64_t k = 0; k < width; k += WIDTH) {
          store_up_to(copy + m * width + k, load_up_to(x(m) + k, width - k), width - k);
        }
      }
    });
    return {copy, width};
  }
}

}  // namespace FSSA_ISA
}  // namespace fssa
