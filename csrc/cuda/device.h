// What the kernels share: rows in pieces of 16 bytes, slots, sums over a warp, the dispatch on the dtype.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../status.h"
#include "interface.h"
#if defined(FSSA_EMULATION)
#include "emulation.h"
#else
#include "instructions.h"
#endif

namespace fssa {
namespace cuda {

constexpr int64_t MOST_SHARED = 48 * 1024;  // bytes a block may have without asking for more

constexpr __device__ __host__ int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr __device__ __host__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr __device__ __host__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A piece: 16 bytes of a row.
template <class T>
constexpr int PIECE = 16 / static_cast<int>(sizeof(T));

// Whether pieces at multiples of a piece, in any row, can be moved as a whole.
template <class T>
__device__ __host__ bool whole_pieces(const void *data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % PIECE<T> == 0;
}

template <class T>
union Bits {
  Bits128 all;
  T element[PIECE<T>];
  __device__ Bits() {}
};

// A piece as float32; zeros where fewer than PIECE elements are left.
template <class T>
__device__ __forceinline__ void load_piece(float (&to)[PIECE<T>], const T *from, int64_t left, bool whole) {
  if (whole && left >= PIECE<T>) {
    Bits<T> bits;
    bits.all = load128(from);
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) to[i] = to_float(bits.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) to[i] = i < left ? to_float(load(from + i)) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_piece(T *to, const float (&from)[PIECE<T>], int64_t left, bool whole) {
  if (whole && left >= PIECE<T>) {
    Bits<T> bits;
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) bits.element[i] = from_float<T>(from[i]);
    store128(to, bits.all);
  } else {
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) {
      if (i < left) store(to + i, from_float<T>(from[i]));
    }
  }
}

// A piece to shared memory: begun where it is whole (then copy_commit and copy_wait are due), done where it is not.
template <class T>
__device__ __forceinline__ void copy_piece(T *to, const T *from, int64_t left, bool whole) {
  const int count = static_cast<int>(larger(0, smaller(left, PIECE<T>)));
  if (whole) {
    copy_async(to, from, count * static_cast<int>(sizeof(T)));
  } else {
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) to[i] = i < count ? load(from + i) : from_float<T>(0.0f);
  }
}

// The slot of a row.
__device__ __forceinline__ int64_t slot_of(const fssa_slots &slots, int64_t row) {
  const int64_t index = row / slots.rows_per_slot;
  return slots.is_int64 ? load(static_cast<const int64_t *>(slots.data) + index)
                        : load(static_cast<const int32_t *>(slots.data) + index);
}

template <class T>
__device__ __forceinline__ const T *row_of(const fssa_input &matrix, int64_t row) {
  return static_cast<const T *>(matrix.data) + row * matrix.stride;
}
template <class T>
__device__ __forceinline__ T *row_of(const fssa_output &matrix, int64_t row) {
  return static_cast<T *>(matrix.data) + row * matrix.stride;
}

// The same sum in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
__device__ __forceinline__ float warp_most(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// body(a T) for the T that the code names.
template <class Body>
void with_dtype(fssa_dtype dtype, const Body &body) {
  switch (dtype) {
    case FSSA_FLOAT32: return body(float());
    case FSSA_BFLOAT16: return body(Bfloat16());
    case FSSA_FLOAT16: return body(Float16());
  }
  fail(FSSA_BAD_VALUE, "dtype: expected 0, 1 or 2, got %d", static_cast<int>(dtype));
}

template <class Body>
fssa_status guarded(const Body &body) {
  try {
    body();
    return FSSA_OK;
  } catch (...) {
    return status_of_exception();
  }
}

}  // namespace cuda
}  // namespace fssa
