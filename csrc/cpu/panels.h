// Products with weights in panels of PANEL columns: [outputs / PANEL][depth][PANEL], zeros where the last is not full.
//
// A panel is read once, in order, for all rows of a batch, so that few rows cost what reading the weights costs. Each
// output element is the sum of parts of PANEL_DEPTH products, in order, whatever the number of rows.
#pragma once

#include "matmul.h"

namespace fssa {
namespace FSSA_ISA {

constexpr int PANEL = 32;
constexpr int PANEL_VECS = PANEL / WIDTH;
constexpr int64_t PANEL_DEPTH = 256;
#if defined(__AVX512F__)
constexpr int PANEL_ROWS = 12;
#elif defined(__AVX2__)
constexpr int PANEL_ROWS = 3;
#else
constexpr int PANEL_ROWS = 1;
#endif

FSSA_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

// tile[i, j] (+)= sum_k x[i][k] w[k, j]; the rows of w lie `stride` apart. Meanwhile `ahead`, unless null, is brought
// nearer: a line for every row of w.
template <int ROWS, class W>
FSSA_INLINE void panel_tile(
    const float *const *x, const W *w, int64_t stride, int64_t depth, float *tile, bool add, const char *ahead) {
  Vec sums[ROWS][PANEL_VECS] = {};
  for (int64_t k = 0; k < depth; k++, w += stride) {
    Vec columns[PANEL_VECS];
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) columns[j] = load(w + j * WIDTH);
    if (ahead) prefetch(ahead + k * 64);
    FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
      const Vec factor = splat(x[i][k]);
      FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) sums[i][j] = fma(factor, columns[j], sums[i][j]);
    }
  }
  FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
    FSSA_UNROLL for (int j = 0; j < PANEL_VECS; j++) {
      float *to = tile + i * PANEL + j * WIDTH;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

// The same for `rows` rows, at most ROWS.
template <int ROWS = PANEL_ROWS, class W>
static void panel_rows(
    int64_t rows, const float *const *x, const W *w, int64_t stride, int64_t depth, float *tile, bool add,
    const char *ahead = nullptr) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return panel_rows<ROWS - 1>(rows, x, w, stride, depth, tile, add, ahead);
  }
  ahead ? panel_tile<ROWS>(x, w, stride, depth, tile, add, ahead)
        : panel_tile<ROWS>(x, w, stride, depth, tile, add, nullptr);
}

// emit(row, column, values, count) takes, for every row m and every panel, values[0 .. count) = (x W)[m, column ..].
template <class W, class Emit>
static void panels(int threads, const float *x, int64_t x_stride, int64_t rows, const W *weight, int64_t outputs,
                   int64_t depth, const Emit &emit) {
  const int64_t count = (outputs + PANEL - 1) / PANEL;
  const int64_t together = greater(1, count / (8 * threads));  // neighbours, of which the next is fetched meanwhile
  const int64_t tiles = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
  parallel(threads, (count + together - 1) / together, [&](int64_t task) {
    const int64_t end = lesser(count, (task + 1) * together);
    for (int64_t p = task * together; p < end; p++) {
      const W *panel = weight + p * depth * PANEL;
      const char *next = p + 1 < end ? reinterpret_cast<const char *>(panel + depth * PANEL) : nullptr;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t first = t * rows / tiles, height = (t + 1) * rows / tiles - first;
        // A tile fetches a line of the next panel for every row of this one: of float32 two tiles fetch all.
        const bool fetches = next && tiles > 1 && t < static_cast<int64_t>(PANEL * sizeof(W) / 64);
        float tile[PANEL_ROWS * PANEL];
        for (int64_t k = 0; k < depth || k == 0; k += PANEL_DEPTH) {
          const float *points[PANEL_ROWS];
          for (int64_t i = 0; i < height; i++) points[i] = x + (first + i) * x_stride + k;
          panel_rows(height, points, panel + k * PANEL, PANEL, lesser(PANEL_DEPTH, depth - k), tile, k > 0,
                     fetches ? next + (t * depth + k) * 64 : nullptr);
        }
        for (int64_t i = 0; i < height; i++) {
          emit(first + i, p * PANEL, static_cast<const float *>(tile + i * PANEL), lesser(PANEL, outputs - p * PANEL));
        }
      }
    }
  });
}

// Rows of a batch in float32: as they are, or copied to scratch memory.
static inline const float *as_floats(Scratch &, const Rows<float> &x, int64_t, int64_t, int64_t *stride) {
  *stride = x.stride;
  return x.data;
}
template <class T>
static const float *as_floats(Scratch &scratch, const Rows<T> &x, int64_t rows, int64_t width, int64_t *stride) {
  float *copy = scratch.floats(rows * width);
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t k = 0; k < width; k += WIDTH) {
      store_up_to(copy + m * width + k, load_up_to(x(m) + k, width - k), width - k);
    }
  }
  *stride = width;
  return copy;
}

}  // namespace FSSA_ISA
}  // namespace fssa
