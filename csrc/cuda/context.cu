// context: from choices to latents in one launch, on to rows of the bank in a second. Made for users of few pairs, where
// the weights decide: they are read by many blocks at once, and each of them once. Any number of pairs is right.
//
// Encode: the pairs of each user in tiles of 16, from its own first pair; block (tile and columns of h, part of E) writes
// its part of the inner encoder's first linear, of both options. The block that ends last of a user's does what remains
// for that user: adds the parts in their order, where E has more than one, inner MLP, attention by the column sums of its
// softmax, pooling, outer MLP, latent.
//
// sum_i sum_j p_ij v_j = W_v (sum_j c_j h_j) + K b_v with c_j = sum_i p_ij: values are never made for a pair.
#include "product.h"

namespace fssa {
namespace cuda {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int64_t PAIRS = 16;                        // of a tile
constexpr int64_t CHUNK = 512, MOST_SPLITS = 8;      // of E: a block sums CHUNK or more
constexpr float LOG2E = 1.4426950408889634f;

template <class T>
using First = Product<T, WARPS, 1, 4, 3>;  // the first linear
template <class T>
using Later = Product<T, WARPS, 1, 8, 2>;  // those that one block does alone

struct Encode {
  fssa_context_input in;
  int64_t splits, chunk;  // of E
  int32_t latent;         // whether the result is the latent [U, H] rather than what the outer encoder gives [U, Z]
  const void *noise;
  void *result;
  // Workspace. h follows `first`, relu'd, where there is an inner MLP.
  float *parts;                        // [splits, N, H] where there are more than one
  void *first, *h, *qk;                // [N, H], [N, H], [N, 2H]
  float *norms, *shares;               // [heads, N]: log2 of a query's denominator; a key's sum over queries
  float *mixed, *vectors;              // [U, heads, H]: a head's sum_j c_j h_j; [U, 2, 2H]
  int32_t *arrived;                    // [U]
};

template <class T>
struct ChoiceRows {
  const T *base;
  const int64_t *choices;
  int64_t embedding, first, count, half, start;  // half 0: the chosen, 1: the rejected
  __device__ __forceinline__ const T *operator()(int row) const {
    if (row >= count) return nullptr;
    const int64_t pair = first + row, option = half == 0 ? load(choices + pair) : 1 - load(choices + pair);
    return base + (2 * pair + option) * embedding + start;
  }
};

__device__ __forceinline__ int64_t first_tile(const fssa_context_input &in, int64_t user) {
  return load(in.offsets + user) / PAIRS + user;
}

// to(n, sum_k x_n[k] w[n][k] + scale bias[n]) for n < outputs, by one thread each; x_n = x_of(n). Four rows a warp at once.
template <class T, class InputOf, class To>
__device__ __forceinline__ void multiply_vector(const T *w, const T *bias, float bias_scale, int64_t outputs, int64_t depth,
                                                const InputOf &x_of, const To &to) {
  constexpr int AT_ONCE = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool whole = whole_pieces<T>(w, depth);
  for (int64_t first = warp * AT_ONCE; first < outputs; first += WARPS * AT_ONCE) {
    float sums[AT_ONCE] = {};
    for (int64_t k = lane * PIECE<T>; k < depth; k += 32 * PIECE<T>) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        if (first + i < outputs) {
          float weights[PIECE<T>];
          load_piece(weights, w + (first + i) * depth + k, depth - k, whole);
          const float *x = x_of(first + i);
#pragma unroll
          for (int n = 0; n < PIECE<T>; n++) {
            if (k + n < depth) sums[i] = fmaf(load(x + k + n), weights[n], sums[i]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) sums[i] = warp_sum(sums[i]);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (lane == i && first + i < outputs) {
        to(first + i, sums[i] + bias_scale * to_float(load(bias + first + i)));
      }
    }
  }
}

// The user's rows x [count, H] times w [outputs, H], plus bias, to y.
template <class T>
__device__ __forceinline__ void multiply_rows(const T *x, const T *w, const T *bias, T *y, int64_t count, int64_t outputs,
                                              int64_t depth) {
  using Tile = Later<T>;
  const bool whole = whole_pieces<T>(x, depth) && whole_pieces<T>(w, depth);
  for (int64_t row = 0; row < count; row += Tile::ROWS) {
    for (int64_t column = 0; column < outputs; column += Tile::COLUMNS) {
      Tile::run(MatrixRows<T>{x + row * depth, depth, count - row},
                MatrixRows<T>{w + column * depth, depth, outputs - column}, depth, whole, whole);
      for (int i = threadIdx.x; i < Tile::ROWS * Tile::COLUMNS; i += THREADS) {
        const int64_t m = row + i / Tile::COLUMNS, n = column + i % Tile::COLUMNS;
        if (m < count && n < outputs) {
          store(y + m * outputs + n,
                from_float<T>(Tile::sum(i / Tile::COLUMNS, i % Tile::COLUMNS) + to_float(load(bias + n))));
        }
      }
      __syncthreads();
    }
  }
}

template <class T>
__device__ __forceinline__ float dot(const T *a, const T *b, int64_t depth, bool whole) {
  float sum = 0.0f;
  for (int64_t d = 0; d < depth; d += PIECE<T>) {
    float x[PIECE<T>], y[PIECE<T>];
    load_piece(x, a + d, depth - d, whole);
    load_piece(y, b + d, depth - d, whole);
#pragma unroll
    for (int i = 0; i < PIECE<T>; i++) sum = fmaf(x[i], y[i], sum);
  }
  return sum;
}

// Every key's share: the sum over the user's queries of its softmax, a head at a time. q and k lie in qk [count, 2H].
template <class T>
__device__ __forceinline__ void share_out(const T *qk, float *norms, float *shares, int64_t head_stride, int64_t count,
                                          int64_t width, int64_t heads) {
  const int64_t depth = width / heads;
  const float exponent = LOG2E * rsqrtf(static_cast<float>(depth));
  const bool whole = depth % PIECE<T> == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t item = warp; item < heads * count; item += WARPS) {
    const int64_t head = item / count, i = item % count;
    float high = -INFINITY, total = 0.0f;
    for (int64_t j = lane; j < count; j += 32) {
      const float score =
          dot(qk + i * 2 * width + head * depth, qk + j * 2 * width + width + head * depth, depth, whole) * exponent;
      const float higher = fmaxf(high, score);
      total = total * exp2f(high - higher) + exp2f(score - higher);
      high = higher;
    }
    const float highest = warp_most(high);
    total = warp_sum(high == -INFINITY ? 0.0f : total * exp2f(high - highest));
    if (lane == 0) store(norms + head * head_stride + i, highest + log2f(total));
  }
  __syncthreads();
  for (int64_t item = threadIdx.x; item < heads * count; item += THREADS) {
    const int64_t head = item / count, j = item % count;
    float share = 0.0f;
    for (int64_t i = 0; i < count; i++) {
      const float score =
          dot(qk + i * 2 * width + head * depth, qk + j * 2 * width + width + head * depth, depth, whole) * exponent;
      share += exp2f(score - load(norms + head * head_stride + i));
    }
    store(shares + head * head_stride + j, share);
  }
  __syncthreads();
}

// log(1 + exp(x))
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The first linear's bias, and ReLU before an MLP; rounded.
template <class T>
__device__ __forceinline__ T first_of(const Encode &e, int64_t n, float sum) {
  sum += to_float(load(static_cast<const T *>(e.in.weights.inner0_bias) + n));
  return from_float<T>(e.in.inner == FSSA_INNER_MLP && sum < 0.0f ? 0.0f : sum);  // lets NaN through
}

// What remains for a user when all parts are there; the whole block.
template <class T>
__device__ __forceinline__ void finish(const Encode &e, int64_t user, int64_t begin, int64_t count) {
  const fssa_context_input &in = e.in;
  const int64_t width = in.latent_width, pairs = in.pair_count;
  const bool mlp = in.inner == FSSA_INNER_MLP;
  T *first = static_cast<T *>(e.first) + begin * width, *h = static_cast<T *>(e.h) + begin * width;
  const auto weights = [](const void *data) { return static_cast<const T *>(data); };
  if (e.splits > 1) {
    for (int64_t i = threadIdx.x; i < count * width; i += THREADS) {
      float sum = 0.0f;
#pragma unroll 4
      for (int64_t split = 0; split < e.splits; split++) {
        sum += load_from_others(e.parts + (split * pairs + begin) * width + i);
      }
      store((mlp ? first : h) + i, first_of<T>(e, i % width, sum));
    }
    __syncthreads();
  }
  if (mlp) {
    multiply_rows(first, weights(in.weights.inner1), weights(in.weights.inner1_bias), h, count, width, width);
  }

  float *pooled = e.vectors + user * 4 * width, *joined = pooled + 2 * width;
  if (in.pooling == FSSA_POOL_ATTENTION) {
    T *qk = static_cast<T *>(e.qk) + begin * 2 * width;
    multiply_rows(h, weights(in.weights.qkv), weights(in.weights.qkv_bias), qk, count, 2 * width, width);
    float *shares = e.shares + begin, *mixed = e.mixed + user * in.heads * width;
    share_out(qk, e.norms + begin, shares, pairs, count, width, in.heads);
    for (int64_t i = threadIdx.x; i < in.heads * width; i += THREADS) {
      float sum = 0.0f;
      for (int64_t j = 0; j < count; j++) {
        sum = fmaf(load(shares + i / width * pairs + j), to_float(load(h + j * width + i % width)), sum);
      }
      store(mixed + i, sum);
    }
    __syncthreads();
    const int64_t depth = width / in.heads;
    multiply_vector(
        weights(in.weights.qkv) + 2 * width * width, weights(in.weights.qkv_bias) + 2 * width, static_cast<float>(count),
        width, width, [&](int64_t n) { return mixed + n / depth * width; },
        [&](int64_t n, float sum) { store(joined + n, sum); });
    __syncthreads();
    multiply_vector(
        weights(in.weights.out), weights(in.weights.out_bias), static_cast<float>(count), width, width,
        [&](int64_t) { return joined; }, [&](int64_t n, float sum) { store(pooled + n, sum); });
  } else {
    const float share = in.pooling == FSSA_POOL_MEAN && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
    for (int64_t n = threadIdx.x; n < width; n += THREADS) {
      float sum = 0.0f;
      for (int64_t j = 0; j < count; j++) sum += to_float(load(h + j * width + n));
      store(pooled + n, share * sum);
    }
  }
  __syncthreads();
  multiply_vector(
      weights(in.weights.outer0), weights(in.weights.outer0_bias), 1.0f, width, width, [&](int64_t) { return pooled; },
      [&](int64_t n, float sum) { store(joined + n, sum < 0.0f ? 0.0f : sum); });
  __syncthreads();
  const bool noisy = e.latent && e.noise != nullptr && in.encoded_width == 2 * width;
  const int64_t outputs = e.latent ? width : in.encoded_width;
  T *result = static_cast<T *>(e.result) + user * outputs;
  multiply_vector(
      weights(in.weights.outer1), weights(in.weights.outer1_bias), 1.0f, noisy ? 2 * width : outputs, width,
      [&](int64_t) { return joined; },
      [&](int64_t n, float sum) {
        if (noisy) {
          store(pooled + n, sum);
        } else {
          store(result + n, from_float<T>(sum));
        }
      });
  if (noisy) {
    __syncthreads();
    for (int64_t n = threadIdx.x; n < width; n += THREADS) {
      const float noise = to_float(load(weights(e.noise) + user * width + n));
      store(result + n, from_float<T>(load(pooled + n) + softplus(load(pooled + width + n)) * noise));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) encode_kernel(Encode e, bool whole_pairs, bool whole_weights) {
  let_next_launch_begin();
  using Tile = First<T>;
  const fssa_context_input &in = e.in;
  const int64_t width = in.latent_width, column_tiles = divide_up(width, Tile::COLUMNS);
  const int64_t tile = blockIdx.x / column_tiles, column = blockIdx.x % column_tiles * Tile::COLUMNS;
  int64_t user = 0, beyond = in.users;  // the last user whose first tile is not after this one
  while (beyond - user > 1) {
    const int64_t middle = (user + beyond) / 2;
    if (first_tile(in, middle) <= tile) {
      user = middle;
    } else {
      beyond = middle;
    }
  }
  const int64_t begin = load(in.offsets + user), count = load(in.offsets + user + 1) - begin;
  const int64_t own_tiles = (begin + count) / PAIRS - begin / PAIRS + 1;
  const int64_t row = (tile - first_tile(in, user)) * PAIRS;
  if (tile - first_tile(in, user) >= own_tiles) return;  // more tiles were launched than there are
  if (row < count) {
    constexpr int OWN = Tile::ROWS * Tile::COLUMNS / THREADS;  // elements of a thread
    static_assert(OWN * THREADS == Tile::ROWS * Tile::COLUMNS, "every thread has as many elements");
    const int64_t start = blockIdx.y * e.chunk, size = smaller(e.chunk, in.embedding_width - start);
    const T *inner0 = static_cast<const T *>(in.weights.inner0) + column * 2 * in.embedding_width + start;
    float sums[OWN] = {};
#pragma unroll 1
    for (int64_t half = 0; half < 2; half++) {
      Tile::run(ChoiceRows<T>{static_cast<const T *>(in.pairs), in.choices, in.embedding_width, begin + row, count - row,
                              half, start},
                MatrixRows<T>{inner0 + half * in.embedding_width, 2 * in.embedding_width, width - column}, size,
                whole_pairs, whole_weights);
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        const int element = static_cast<int>(threadIdx.x) + i * THREADS;
        sums[i] += Tile::sum(element / Tile::COLUMNS, element % Tile::COLUMNS);
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int element = static_cast<int>(threadIdx.x) + i * THREADS, m = element / Tile::COLUMNS;
      const int64_t n = column + element % Tile::COLUMNS;
      if (row + m >= count || n >= width) continue;
      const int64_t at = (begin + row + m) * width + n;
      if (e.splits > 1) {
        store(e.parts + blockIdx.y * in.pair_count * width + at, sums[i]);
      } else {
        store(static_cast<T *>(in.inner == FSSA_INNER_MLP ? e.first : e.h) + at, first_of<T>(e, n, sums[i]));
      }
    }
  }
  // Who arrives last finds the parts of all others.
  int *last = reinterpret_cast<int *>(shared_memory());
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int64_t blocks = own_tiles * column_tiles * e.splits;
    *last = atomicAdd(e.arrived + user, 1) == static_cast<int32_t>(blocks - 1);
  }
  __syncthreads();
  const bool mine = *last != 0;
  __syncthreads();  // the memory that told is used again
  if (mine) {
    __threadfence();
    finish<T>(e, user, begin, count);
  }
}

struct Rows {
  int64_t users, depth, width;
  const void *latents, *modulation, *bias;
  fssa_dtype bank_dtype;
  fssa_output bank;
  fssa_slots slots;
};

__device__ __forceinline__ void store_as(fssa_dtype dtype, void *to, int64_t at, float value) {
  switch (dtype) {
    case FSSA_FLOAT32: store(static_cast<float *>(to) + at, value); break;
    case FSSA_BFLOAT16: store(static_cast<Bfloat16 *>(to) + at, from_float<Bfloat16>(value)); break;
    case FSSA_FLOAT16: store(static_cast<Float16 *>(to) + at, from_float<Float16>(value)); break;
  }
}

// Block (users and columns): bank[slots] = modulation latent + bias.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::THREADS) rows_kernel(Rows r, bool whole_latents, bool whole_modulation) {
  const int64_t column_tiles = divide_up(r.width, Tile::COLUMNS);
  const int64_t user = blockIdx.x / column_tiles * Tile::ROWS, column = blockIdx.x % column_tiles * Tile::COLUMNS;
  wait_for_launch_before();
  Tile::run(MatrixRows<T>{static_cast<const T *>(r.latents) + user * r.depth, r.depth, r.users - user},
            MatrixRows<T>{static_cast<const T *>(r.modulation) + column * r.depth, r.depth, r.width - column}, r.depth,
            whole_latents, whole_modulation);
  const T *bias = static_cast<const T *>(r.bias) + column;
  for (int i = threadIdx.x; i < Tile::ROWS * Tile::COLUMNS; i += Tile::THREADS) {
    const int m = i / Tile::COLUMNS, n = i % Tile::COLUMNS;
    if (user + m < r.users && column + n < r.width) {
      store_as(r.bank_dtype, r.bank.data, slot_of(r.slots, user + m) * r.bank.stride + column + n,
               Tile::sum(m, n) + to_float(load(bias + n)));
    }
  }
}

// Lays the workspace out from `base`, which may be null: the size is what matters then.
int64_t lay_out(Encode &e, void *base) {
  const fssa_context_input &in = e.in;
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    void *at = base == nullptr ? nullptr : static_cast<char *>(base) + used;
    used += divide_up(bytes, 256) * 256;
    return at;
  };
  const int64_t size = in.dtype == FSSA_FLOAT32 ? 4 : 2, pairs = in.pair_count, width = in.latent_width;
  const bool attention = in.pooling == FSSA_POOL_ATTENTION;
  e.splits = larger(1, smaller(MOST_SPLITS, in.embedding_width / CHUNK));
  e.chunk = larger(1, divide_up(divide_up(in.embedding_width, e.splits), 128)) * 128;  // whole steps of every dtype
  e.splits = larger(1, divide_up(in.embedding_width, e.chunk));
  e.parts = static_cast<float *>(take(e.splits > 1 ? e.splits * pairs * width * 4 : 0));
  e.first = take(in.inner == FSSA_INNER_MLP ? pairs * width * size : 0);
  e.h = take(pairs * width * size);
  e.qk = take(attention ? pairs * 2 * width * size : 0);
  e.norms = static_cast<float *>(take(attention ? in.heads * pairs * 4 : 0));
  e.shares = static_cast<float *>(take(attention ? in.heads * pairs * 4 : 0));
  e.mixed = static_cast<float *>(take(attention ? in.users * in.heads * width * 4 : 0));
  e.vectors = static_cast<float *>(take(in.users * 4 * width * 4));
  e.arrived = static_cast<int32_t *>(take(in.users * 4));
  return used;
}

template <class T>
void encode(const fssa_context_input &in, bool latent, const void *noise, void *result, void *workspace, void *stream) {
  if (in.users == 0) return;
  Encode e{};
  e.in = in, e.latent = latent, e.noise = noise, e.result = result;
  lay_out(e, workspace);
  clear(e.arrived, static_cast<size_t>(in.users) * 4, stream);
  using Tile = First<T>;
  const int64_t tiles = (in.pair_count / PAIRS + in.users) * divide_up(in.latent_width, Tile::COLUMNS);
  const bool whole_pairs = whole_pieces<T>(in.pairs, in.embedding_width);
  const bool whole_weights = whole_pieces<T>(in.weights.inner0, in.embedding_width);
  launch("context: encode", encode_kernel<T>,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(e.splits)), THREADS,
         larger(Tile::SHARED, Later<T>::SHARED), stream, false, e, whole_pairs, whole_weights);
}

template <class T, class Tile>
void rows(const fssa_context_rows_args &a, void *stream) {
  const Rows r{a.input.users, a.input.latent_width, a.bank_width, a.latents, a.modulation, a.modulation_bias,
               a.bank_dtype,  a.bank,               a.slots};
  const int64_t tiles = divide_up(r.users, Tile::ROWS) * divide_up(r.width, Tile::COLUMNS);
  if (tiles == 0) return;
  launch("context: rows", rows_kernel<T, Tile>, dim3(static_cast<unsigned>(tiles)), Tile::THREADS, Tile::SHARED, stream,
         true, r, whole_pieces<T>(r.latents, r.depth), whole_pieces<T>(r.modulation, r.depth));
}

}  // namespace
}  // namespace cuda
}  // namespace fssa

using namespace fssa::cuda;

int64_t fssa_cuda_context_workspace(const fssa_context_input *input) {
  Encode e{};
  e.in = *input;
  return lay_out(e, nullptr);
}

fssa_status fssa_cuda_context(const fssa_context_args *args, void *workspace, void *stream) {
  return guarded([&] {
    with_dtype(args->input.dtype, [&](auto t) {
      encode<decltype(t)>(args->input, false, nullptr, args->encoded, workspace, stream);
    });
  });
}

fssa_status fssa_cuda_context_rows(const fssa_context_rows_args *args, void *workspace, void *stream) {
  return guarded([&] {
    with_dtype(args->input.dtype, [&](auto t) {
      using T = decltype(t);
      encode<T>(args->input, true, args->noise, args->latents, workspace, stream);
      if (args->input.users > FEW_ROWS) {
        rows<T, Many<T>>(*args, stream);
      } else {
        rows<T, Few<T, 8>>(*args, stream);
      }
    });
  });
}
