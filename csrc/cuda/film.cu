// film and film_norm: one launch each, 16 bytes a thread at a time.
#include "device.h"

namespace fssa {
namespace cuda {
namespace {

constexpr int FILM_THREADS = 128, MOST_NORM_THREADS = 512;

// y = x * (1 + scale[slot]) + shift[slot]; block (row, stretch of columns).
template <class T>
__global__ void __launch_bounds__(FILM_THREADS) film_kernel(fssa_film_args a, bool whole) {
  const int64_t row = blockIdx.x;
  const int64_t d = (static_cast<int64_t>(blockIdx.y) * FILM_THREADS + threadIdx.x) * PIECE<T>;
  const int64_t left = a.width - d;
  if (left <= 0) return;
  const int64_t slot = slot_of(a.slots, row);
  float x[PIECE<T>], scale[PIECE<T>], shift[PIECE<T>];
  load_piece(x, row_of<T>(a.x, row) + d, left, whole);
  load_piece(scale, row_of<T>(a.film.scale, slot) + d, left, whole);
  load_piece(shift, row_of<T>(a.film.shift, slot) + d, left, whole);
#pragma unroll
  for (int i = 0; i < PIECE<T>; i++) x[i] = fmaf(x[i], 1.0f + scale[i], shift[i]);
  store_piece(row_of<T>(a.y, row) + d, x, left, whole);
}

// The sum over the block's threads, in every thread; `sums` has room for a number a warp.
__device__ __forceinline__ float block_sum(float value, float *sums) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  value = warp_sum(value);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

// hidden = film(residual + x), normed = weight * hidden / rms(hidden), of hidden as it is stored. A row a block.
// What of the row fits, `kept` elements, waits in shared memory for the norm; a thread reads what it wrote itself.
template <class T>
__global__ void __launch_bounds__(MOST_NORM_THREADS) film_norm_kernel(fssa_film_norm_args a, bool whole, int64_t kept) {
  float *sums = reinterpret_cast<float *>(shared_memory());
  T *keep = reinterpret_cast<T *>(sums + 32);
  const int64_t row = blockIdx.x, slot = slot_of(a.slots, row), step = static_cast<int64_t>(blockDim.x) * PIECE<T>;
  const T *x_row = row_of<T>(a.x, row), *residual_row = row_of<T>(a.residual, row);
  const T *scale_row = row_of<T>(a.film.scale, slot), *shift_row = row_of<T>(a.film.shift, slot);
  const T *weight = static_cast<const T *>(a.norm.weight);
  T *hidden_row = row_of<T>(a.hidden, row), *normed_row = row_of<T>(a.normed, row);
  float squares = 0.0f;
  for (int64_t d = threadIdx.x * PIECE<T>; d < a.width; d += step) {
    const int64_t left = a.width - d;
    float x[PIECE<T>], residual[PIECE<T>], scale[PIECE<T>], shift[PIECE<T>];
    load_piece(x, x_row + d, left, whole);
    load_piece(residual, residual_row + d, left, whole);
    load_piece(scale, scale_row + d, left, whole);
    load_piece(shift, shift_row + d, left, whole);
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) {
      x[i] = to_float(from_float<T>(fmaf(residual[i] + x[i], 1.0f + scale[i], shift[i])));
      squares = fmaf(x[i], x[i], squares);
    }
    store_piece(hidden_row + d, x, left, whole);
    if (d < kept) store_piece(keep + d, x, PIECE<T>, true);
  }
  const float inverse = rsqrtf(block_sum(squares, sums) / static_cast<float>(a.width) + a.norm.eps);
  for (int64_t d = threadIdx.x * PIECE<T>; d < a.width; d += step) {
    const int64_t left = a.width - d;
    float hidden[PIECE<T>], scaled[PIECE<T>];
    if (d < kept) {
      load_piece(hidden, keep + d, PIECE<T>, true);
    } else {
      load_piece(hidden, hidden_row + d, left, whole);
    }
    load_piece(scaled, weight + d, left, whole);
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) scaled[i] = hidden[i] * inverse * scaled[i];
    store_piece(normed_row + d, scaled, left, whole);
  }
}

template <class T>
void film(const fssa_film_args &a, void *stream) {
  const bool whole = whole_pieces<T>(a.x.data, a.x.stride) && whole_pieces<T>(a.film.scale.data, a.film.scale.stride) &&
                     whole_pieces<T>(a.film.shift.data, a.film.shift.stride) && whole_pieces<T>(a.y.data, a.y.stride);
  const int64_t stretches = divide_up(a.width, FILM_THREADS * PIECE<T>);
  launch("film", film_kernel<T>, dim3(static_cast<unsigned>(a.rows), static_cast<unsigned>(stretches)), FILM_THREADS, 0,
         stream, false, a, whole);
}

template <class T>
void film_norm(const fssa_film_norm_args &a, void *stream) {
  const bool whole = whole_pieces<T>(a.x.data, a.x.stride) && whole_pieces<T>(a.residual.data, a.residual.stride) &&
                     whole_pieces<T>(a.film.scale.data, a.film.scale.stride) &&
                     whole_pieces<T>(a.film.shift.data, a.film.shift.stride) &&
                     whole_pieces<T>(a.norm.weight, 0) && whole_pieces<T>(a.hidden.data, a.hidden.stride) &&
                     whole_pieces<T>(a.normed.data, a.normed.stride);
  // The order of the sum follows from the number of threads, and that from the width.
  const int64_t threads = smaller(MOST_NORM_THREADS, divide_up(divide_up(a.width, PIECE<T>), 32) * 32);
  constexpr int64_t SUMS = 32 * sizeof(float), ROOM = (MOST_SHARED - SUMS) / 16 * PIECE<T>;
  const int64_t kept = smaller(ROOM, divide_up(a.width, PIECE<T>) * PIECE<T>);
  launch("film_norm", film_norm_kernel<T>, dim3(static_cast<unsigned>(a.rows)), static_cast<unsigned>(threads),
         static_cast<size_t>(SUMS + kept * static_cast<int64_t>(sizeof(T))), stream, false, a, whole, kept);
}

}  // namespace
}  // namespace cuda
}  // namespace fssa

using namespace fssa::cuda;

fssa_status fssa_cuda_film(const fssa_film_args *args, void *stream) {
  return guarded([&] {
    if (args->rows == 0 || args->width == 0) return;
    with_dtype(args->dtype, [&](auto t) { film<decltype(t)>(*args, stream); });
  });
}

fssa_status fssa_cuda_film_norm(const fssa_film_norm_args *args, void *stream) {
  return guarded([&] {
    if (args->rows == 0 || args->width == 0) return;
    with_dtype(args->dtype, [&](auto t) { film_norm<decltype(t)>(*args, stream); });
  });
}
