// The product of a tile of rows with a tile of weight rows, both read along K: what shrink, the context encoder's linears
// and the modulation are made of.
#pragma once

#include "device.h"

namespace fssa {
namespace cuda {

// Products of one slice of K, whose accumulators lie as multiply_add's c: of 16-bit numbers by tensor cores, K = 16; of
// float32 by fused multiply-adds in the order of K, K = 8.
template <class T>
constexpr int SLICE = sizeof(T) == 2 ? 16 : 8;

// c[i][j] += (16 rows at a + i 16 rows) (8 weight rows at b + j 8 rows), along a slice that is adjacent in both.
template <class T, int MT, int NT>
__device__ __forceinline__ void multiply_slice(float (&c)[MT][NT][4], const T *a, int a_pitch, const T *b, int b_pitch) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(NT % 2 == 0, "two tiles of weights are loaded at a time");
    uint32_t rows[MT][4];
#pragma unroll
    for (int i = 0; i < MT; i++) load_matrices(rows[i], a + (16 * i + lane % 16) * a_pitch + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t weights[4];
      load_matrices(weights, b + (8 * j + lane % 8 + lane / 16 * 8) * b_pitch + lane / 8 % 2 * 8);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        multiply_add<T>(c[i][j], rows[i], weights[0], weights[1]);
        multiply_add<T>(c[i][j + 1], rows[i], weights[2], weights[3]);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2  // more of them at once need more registers than there are
    for (int k = 0; k < SLICE<T>; k++) {
      float weights[NT][2];
#pragma unroll
      for (int j = 0; j < NT; j++) {
        weights[j][0] = b[(8 * j + 2 * t) * b_pitch + k];
        weights[j][1] = b[(8 * j + 2 * t + 1) * b_pitch + k];
      }
#pragma unroll
      for (int i = 0; i < MT; i++) {
        const float low = a[(16 * i + g) * a_pitch + k], high = a[(16 * i + g + 8) * a_pitch + k];
#pragma unroll
        for (int j = 0; j < NT; j++) {
          c[i][j][0] = fmaf(low, weights[j][0], c[i][j][0]);
          c[i][j][1] = fmaf(low, weights[j][1], c[i][j][1]);
          c[i][j][2] = fmaf(high, weights[j][0], c[i][j][2]);
          c[i][j][3] = fmaf(high, weights[j][1], c[i][j][3]);
        }
      }
    }
  }
}

// Rows of a matrix in memory, `count` of them.
template <class T>
struct MatrixRows {
  static constexpr bool RESIDENT = false;
  const T *base;
  int64_t stride, count;
  __device__ __forceinline__ const T *operator()(int row) const { return row < count ? base + row * stride : nullptr; }
};

// A tile's rows in shared memory, zeros from their end to that of a whole step; stride is a multiple of a piece.
template <class T>
struct ResidentRows {
  static constexpr bool RESIDENT = true;
  const T *base;
  int64_t stride;
  __device__ __forceinline__ const T *operator()(int row) const { return base + row * stride; }
};

// A block's product of 16 MT rows by 8 NT weight rows. K goes through shared memory in steps of a slice a warp, STAGES
// of them at once under way; the warps' sums are added in order at the end. An element's bits depend on its row, its
// weight row and WARPS: not on the tile's shape.
template <class T, int WARPS, int MT, int NT, int STAGES>
struct Product {
  static constexpr int ROWS = 16 * MT, COLUMNS = 8 * NT, THREADS = 32 * WARPS;
  static constexpr int STEP = SLICE<T> * WARPS, PIECES = STEP / PIECE<T>;
  static constexpr int PITCH = STEP + PIECE<T>;  // a piece more than a step: rows begin in different banks
  static constexpr int STAGE = (ROWS + COLUMNS) * PITCH;
  static constexpr int SHARED = static_cast<int>(
      larger(STAGES * STAGE * static_cast<int>(sizeof(T)), WARPS * ROWS * COLUMNS * static_cast<int>(sizeof(float))));
  static_assert(SHARED <= MOST_SHARED, "too much shared memory");

  // row_at(r) and weight_at(n) point at the first of `size` elements, or are null outside; their `base` is an address of
  // the same alignment. Afterwards sum() can be read by every thread; a __syncthreads() is due before the next run.
  template <class RowAt, class WeightAt>
  static __device__ __forceinline__ void run(const RowAt &row_at, const WeightAt &weight_at, int64_t size,
                                             bool whole_rows, bool whole_weights) {
    constexpr int HERE = RowAt::RESIDENT ? ROWS : 0;  // lines of a stage that need not be brought
    constexpr int SOURCES = (ROWS + COLUMNS - HERE) * PIECES / THREADS;  // pieces a thread brings for a step
    static_assert((ROWS + COLUMNS - HERE) * PIECES % THREADS == 0, "every thread brings as many pieces");
    T *stages = reinterpret_cast<T *>(shared_memory());
    const T *source[SOURCES];
    const T *const row_base = row_at.base, *const weight_base = weight_at.base;
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < SOURCES; i++) {
      const int line = HERE + (static_cast<int>(threadIdx.x) + i * THREADS) / PIECES;
      source[i] = line < ROWS ? row_at(line) : weight_at(line - ROWS);
    }
    const auto bring = [&](int64_t step) {
      T *stage = stages + step % STAGES * STAGE;
#pragma unroll
      for (int i = 0; i < SOURCES; i++) {
        const int number = static_cast<int>(threadIdx.x) + i * THREADS, line = HERE + number / PIECES;
        const int64_t at = step * STEP + number % PIECES * PIECE<T>;
        const int64_t left = source[i] == nullptr ? 0 : size - at;
        const T *from = line < ROWS ? row_base : weight_base;  // of no bytes, but aligned
        if (left > 0) from = source[i] + at;
        copy_piece(stage + line * PITCH + number % PIECES * PIECE<T>, from, left, line < ROWS ? whole_rows : whole_weights);
      }
    };
    float c[MT][NT][4] = {};
    const int64_t steps = divide_up(size, STEP);
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
      if (step < steps) bring(step);
      copy_commit();
    }
    for (int64_t step = 0; step < steps; step++) {
      copy_wait<STAGES - 2>();
      __syncthreads();  // the step is here for all threads, and all are done with the stage that is filled next
      if (step + STAGES - 1 < steps) bring(step + STAGES - 1);
      copy_commit();
      const T *stage = stages + step % STAGES * STAGE + warp * SLICE<T>;
      if constexpr (RowAt::RESIDENT) {
        const T *rows = row_base + step * STEP + warp * SLICE<T>;
        multiply_slice<T, MT, NT>(c, rows, static_cast<int>(row_at.stride), stage + ROWS * PITCH, PITCH);
      } else {
        multiply_slice<T, MT, NT>(c, stage, PITCH, stage + ROWS * PITCH, PITCH);
      }
    }
    copy_wait<0>();
    __syncthreads();  // nobody reads the stages any more
    float *sums = reinterpret_cast<float *>(shared_memory()) + warp * ROWS * COLUMNS;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float *to = sums + (16 * i + 8 * half + g) * COLUMNS + 8 * j + 2 * t;
          to[0] = c[i][j][2 * half];
          to[1] = c[i][j][2 * half + 1];
        }
      }
    }
    __syncthreads();
  }

  static __device__ __forceinline__ float sum(int row, int column) {
    const float *sums = reinterpret_cast<const float *>(shared_memory());
    float total = sums[row * COLUMNS + column];
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) total += sums[(warp * ROWS + row) * COLUMNS + column];
    return total;
  }
};

// The tiles of a product whose rows are many or few; both give the same bits.
template <class T, int NT>
using Few = Product<T, 4, 1, NT, 4>;
template <class T>
using Many = Product<T, 4, 4, 4, 3>;
constexpr int64_t FEW_ROWS = 64;

}  // namespace cuda
}  // namespace fssa
