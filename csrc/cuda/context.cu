// context: from choices to latents in one launch, on to rows of the bank in a second. Made for users of few pairs, where
// the weights decide: they are read by many blocks at once, and each of them once. Any number of pairs is right.
//
// Encode: the pairs of each user in tiles of 16, from its own first pair; block (tile and columns of h, part of E) writes
// its part of the inner encoder's first linear, of both options. The block that ends last of a user's does what remains
// for that user: adds the parts in their order, inner MLP, attention by the column sums of its softmax, pooling, outer
// MLP, latent. What it makes on the way for a user of few pairs stays on the chip. Where there are many users and E is
// small, one block does all for such a user, the first linear too, and nothing goes through memory. The bits are the
// same in each of these ways.
//
// sum_i sum_j p_ij v_j = W_v (sum_j c_j h_j) + K b_v with c_j = sum_i p_ij: values are never made for a pair.
#include "product.h"

namespace fssa {
namespace cuda {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int64_t PAIRS = 16;                        // of a tile
constexpr int64_t CHUNK = 512, MOST_SPLITS = 8;      // of E: a block sums CHUNK or more
constexpr int64_t MOST_ON_CHIP = 64;                 // pairs of a user
constexpr int64_t MANY_USERS = 16;                   // as many blocks as these keep the chip busy
constexpr float LOG2E = 1.4426950408889634f;

template <class T>
using First = Product<T, WARPS, 1, 4, 3>;  // the first linear
template <class T>
using Later = Product<T, WARPS, 1, 8, 2>;  // those that one block does alone

struct Encode {
  fssa_context_input in;
  int64_t splits, chunk;  // of E
  int64_t column_blocks;  // that share the columns of h; 1 where one block does all for a user whose numbers fit the chip
  int64_t room;           // pairs of a user whose numbers do; negative where not even those of none
  int32_t latent;         // whether the result is the latent [U, H] rather than what the outer encoder gives [U, Z]
  const void *noise;
  void *result;
  // Workspace; what follows `parts` and `arrived` is of users whose numbers do not fit the chip.
  float *parts;                        // [splits, N, H]
  int32_t *arrived;                    // [U]
  void *first, *h, *qk;                // [N, H], [N, H], [N, 2H]
  float *norms, *shares;               // [heads, N]
  float *mixed, *vectors;              // [U, heads, H], [U, 2, 2H]
};

// What is made for a user on the way: in the workspace, or on the chip.
template <class T>
struct Between {
  bool on_chip;
  int64_t stride, qk_stride, head_stride;
  T *first, *h, *qk;      // [n, H], [n, H], [n, 2H]; h follows `first`, relu'd, where there is an inner MLP
  float *norms, *shares;  // [heads, n]: log2 of a query's denominator; a key's sum over queries
  float *mixed, *vectors; // [heads, H]: a head's sum_j c_j h_j; [2, 2H]
};

template <class T>
constexpr int64_t STAGES = divide_up(larger(First<T>::SHARED, Later<T>::SHARED), 16) * 16;  // bytes; the rest follows

// Lays out what is made for a user of up to `pairs` pairs, a multiple of 16, from `base` on; `size` is how many bytes.
template <class T>
__host__ __device__ __forceinline__ Between<T> lay_out_on_chip(const fssa_context_input &in, int64_t pairs,
                                                               unsigned char *base, int64_t &size) {
  const int64_t width = in.encoder.latent_width;
  const bool attention = in.encoder.pooling == FSSA_POOL_ATTENTION, mlp = in.encoder.inner == FSSA_INNER_MLP;
  size = 0;
  const auto take = [&](int64_t bytes) {
    unsigned char *at = base == nullptr ? nullptr : base + size;
    size += divide_up(bytes, 16) * 16;
    return at;
  };
  Between<T> b{};
  b.on_chip = true;
  b.stride = divide_up(width, Later<T>::STEP) * Later<T>::STEP + PIECE<T>;  // rows begin in different banks
  b.qk_stride = divide_up(2 * width, PIECE<T>) * PIECE<T> + PIECE<T>;
  b.head_stride = pairs;
  const int64_t element = static_cast<int64_t>(sizeof(T));
  b.h = reinterpret_cast<T *>(take(pairs * b.stride * element));
  b.first = b.qk = reinterpret_cast<T *>(  // the one is read no more when the other is made
      take(pairs * larger(mlp ? b.stride : 0, attention ? b.qk_stride : 0) * element));
  b.norms = reinterpret_cast<float *>(take(attention ? in.encoder.heads * pairs * 4 : 0));
  b.shares = reinterpret_cast<float *>(take(attention ? in.encoder.heads * pairs * 4 : 0));
  b.mixed = reinterpret_cast<float *>(take(attention ? in.encoder.heads * width * 4 : 0));
  b.vectors = reinterpret_cast<float *>(take(4 * width * 4));
  return b;
}

template <class T>
__device__ __forceinline__ Between<T> between(const Encode &e, int64_t user, int64_t begin, int64_t count) {
  const fssa_context_input &in = e.in;
  const int64_t width = in.encoder.latent_width;
  if (count <= e.room) {
    int64_t size;
    return lay_out_on_chip<T>(in, e.room, shared_memory() + STAGES<T>, size);
  }
  return {false, width, 2 * width, in.pair_count, static_cast<T *>(e.first) + begin * width,
          static_cast<T *>(e.h) + begin * width, static_cast<T *>(e.qk) + begin * 2 * width, e.norms + begin,
          e.shares + begin, e.mixed + user * in.encoder.heads * width, e.vectors + user * 4 * width};
}

template <class T>
struct ChoiceRows {
  static constexpr bool RESIDENT = false;
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
__device__ __forceinline__ void multiply_rows(const T *x, int64_t x_stride, bool on_chip, const T *w, const T *bias, T *y,
                                              int64_t y_stride, int64_t count, int64_t outputs, int64_t depth) {
  using Tile = Later<T>;
  const bool whole_rows = whole_pieces<T>(x, x_stride), whole_weights = whole_pieces<T>(w, depth);
  for (int64_t row = 0; row < count; row += Tile::ROWS) {
    for (int64_t column = 0; column < outputs; column += Tile::COLUMNS) {
      const MatrixRows<T> weights{w + column * depth, depth, outputs - column};
      if (on_chip) {
        Tile::run(ResidentRows<T>{x + row * x_stride, x_stride}, weights, depth, true, whole_weights);
      } else {
        Tile::run(MatrixRows<T>{x + row * x_stride, x_stride, count - row}, weights, depth, whole_rows, whole_weights);
      }
      for (int i = threadIdx.x; i < Tile::ROWS * Tile::COLUMNS; i += THREADS) {
        const int64_t m = row + i / Tile::COLUMNS, n = column + i % Tile::COLUMNS;
        if (m < count && n < outputs) {
          store(y + m * y_stride + n,
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

// Every key's share: the sum over the user's queries of its softmax, a head at a time.
template <class T>
__device__ __forceinline__ void share_out(const Between<T> &b, int64_t count, int64_t width, int64_t heads) {
  const T *q = b.qk, *k = b.qk + width;
  const int64_t depth = width / heads;
  const float exponent = LOG2E * rsqrtf(static_cast<float>(depth));
  const bool whole = depth % PIECE<T> == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t item = warp; item < heads * count; item += WARPS) {
    const int64_t head = item / count, i = item % count;
    float high = -INFINITY, total = 0.0f;
    for (int64_t j = lane; j < count; j += 32) {
      const float score =
          dot(q + i * b.qk_stride + head * depth, k + j * b.qk_stride + head * depth, depth, whole) * exponent;
      const float higher = fmaxf(high, score);
      total = total * exp2f(high - higher) + exp2f(score - higher);
      high = higher;
    }
    const float highest = warp_most(high);
    total = warp_sum(high == -INFINITY ? 0.0f : total * exp2f(high - highest));
    if (lane == 0) store(b.norms + head * b.head_stride + i, highest + log2f(total));
  }
  __syncthreads();
  for (int64_t item = threadIdx.x; item < heads * count; item += THREADS) {
    const int64_t head = item / count, j = item % count;
    float share = 0.0f;
    for (int64_t i = 0; i < count; i++) {
      const float score =
          dot(q + i * b.qk_stride + head * depth, k + j * b.qk_stride + head * depth, depth, whole) * exponent;
      share += exp2f(score - load(b.norms + head * b.head_stride + i));
    }
    store(b.shares + head * b.head_stride + j, share);
  }
  __syncthreads();
}

// log(1 + exp(x))
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The first linear's bias, and ReLU before an MLP; rounded.
template <class T>
__device__ __forceinline__ T first_of(const Encode &e, int64_t n, float sum) {
  sum += to_float(load(static_cast<const T *>(e.in.weights.inner0_bias) + n));
  return from_float<T>(e.in.encoder.inner == FSSA_INNER_MLP && sum < 0.0f ? 0.0f : sum);  // lets NaN through
}

// What the first linear gives: h, or what the inner MLP's second makes h of.
template <class T>
__device__ __forceinline__ T *first_rows(const Encode &e, const Between<T> &b) {
  return e.in.encoder.inner == FSSA_INNER_MLP ? b.first : b.h;
}

// Adds the parts of the user's first linear in their order.
template <class T>
__device__ __forceinline__ void add_parts(const Encode &e, const Between<T> &b, int64_t begin, int64_t count) {
  const int64_t width = e.in.encoder.latent_width;
  for (int64_t i = threadIdx.x; i < count * width; i += THREADS) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t split = 0; split < e.splits; split++) {
      sum += load_from_others(e.parts + (split * e.in.pair_count + begin) * width + i);
    }
    store(first_rows(e, b) + i / width * b.stride + i % width, first_of<T>(e, i % width, sum));
  }
}

// What remains for a user when the first linear is there; the whole block.
template <class T>
__device__ __forceinline__ void finish(const Encode &e, const Between<T> &b, int64_t user, int64_t count) {
  const fssa_context_input &in = e.in;
  const int64_t width = in.encoder.latent_width;
  const auto weights = [](const void *data) { return static_cast<const T *>(data); };
  if (b.on_chip) {  // products read whole steps
    const int64_t more = b.stride - PIECE<T> - width;
    for (int64_t i = threadIdx.x; i < count * more; i += THREADS) {
      const int64_t at = i / more * b.stride + width + i % more;
      store(b.h + at, from_float<T>(0.0f));
      if (in.encoder.inner == FSSA_INNER_MLP) store(b.first + at, from_float<T>(0.0f));
    }
  }
  __syncthreads();
  if (in.encoder.inner == FSSA_INNER_MLP) {
    multiply_rows(b.first, b.stride, b.on_chip, weights(in.weights.inner1), weights(in.weights.inner1_bias), b.h, b.stride,
                  count, width, width);
  }

  float *pooled = b.vectors, *joined = pooled + 2 * width;
  if (in.encoder.pooling == FSSA_POOL_ATTENTION) {
    multiply_rows(b.h, b.stride, b.on_chip, weights(in.weights.qkv), weights(in.weights.qkv_bias), b.qk, b.qk_stride, count,
                  2 * width, width);
    share_out(b, count, width, in.encoder.heads);
    for (int64_t i = threadIdx.x; i < in.encoder.heads * width; i += THREADS) {
      float sum = 0.0f;
      for (int64_t j = 0; j < count; j++) {
        sum = fmaf(load(b.shares + i / width * b.head_stride + j), to_float(load(b.h + j * b.stride + i % width)), sum);
      }
      store(b.mixed + i, sum);
    }
    __syncthreads();
    const int64_t depth = width / in.encoder.heads;
    multiply_vector(
        weights(in.weights.qkv) + 2 * width * width, weights(in.weights.qkv_bias) + 2 * width, static_cast<float>(count),
        width, width, [&](int64_t n) { return b.mixed + n / depth * width; },
        [&](int64_t n, float sum) { store(joined + n, sum); });
    __syncthreads();
    multiply_vector(
        weights(in.weights.out), weights(in.weights.out_bias), static_cast<float>(count), width, width,
        [&](int64_t) { return joined; }, [&](int64_t n, float sum) { store(pooled + n, sum); });
  } else {
    const float share = in.encoder.pooling == FSSA_POOL_MEAN && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f;
    for (int64_t n = threadIdx.x; n < width; n += THREADS) {
      float sum = 0.0f;
      for (int64_t j = 0; j < count; j++) sum += to_float(load(b.h + j * b.stride + n));
      store(pooled + n, share * sum);
    }
  }
  __syncthreads();
  multiply_vector(
      weights(in.weights.outer0), weights(in.weights.outer0_bias), 1.0f, width, width, [&](int64_t) { return pooled; },
      [&](int64_t n, float sum) { store(joined + n, sum < 0.0f ? 0.0f : sum); });
  __syncthreads();
  const bool noisy = e.latent && e.noise != nullptr && in.encoder.encoded_width == 2 * width;
  const int64_t outputs = e.latent ? width : in.encoder.encoded_width;
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
  const int64_t width = in.encoder.latent_width, embedding = in.encoder.embedding_width;
  const int64_t tile = blockIdx.x / e.column_blocks;
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
  const int64_t own_tiles = (begin + count) / PAIRS - begin / PAIRS + 1, number = tile - first_tile(in, user);
  const bool all = e.column_blocks == 1 && e.splits == 1 && count <= e.room;  // one block's work
  if (number >= (all ? 1 : own_tiles)) return;  // more tiles were launched than there are
  const Between<T> b = between<T>(e, user, begin, count);
  const int64_t start = blockIdx.y * e.chunk, size = smaller(e.chunk, embedding - start);
  for (int64_t row = number * PAIRS; row < (all ? count : smaller(count, (number + 1) * PAIRS)); row += PAIRS) {
    for (int64_t column = blockIdx.x % e.column_blocks * Tile::COLUMNS; column < width;
         column += e.column_blocks * Tile::COLUMNS) {
      constexpr int OWN = Tile::ROWS * Tile::COLUMNS / THREADS;  // elements of a thread
      static_assert(OWN * THREADS == Tile::ROWS * Tile::COLUMNS, "every thread has as many elements");
      const T *inner0 = static_cast<const T *>(in.weights.inner0) + column * 2 * embedding + start;
      float sums[OWN] = {};
#pragma unroll 1
      for (int64_t half = 0; half < 2; half++) {
        Tile::run(ChoiceRows<T>{static_cast<const T *>(in.pairs), in.choices, embedding, begin + row, count - row,
                                half, start},
                  MatrixRows<T>{inner0 + half * embedding, 2 * embedding, width - column}, size,
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
        const int element = static_cast<int>(threadIdx.x) + i * THREADS;
        const int64_t m = row + element / Tile::COLUMNS, n = column + element % Tile::COLUMNS;
        if (m >= count || n >= width) continue;
        if (all) {
          store(first_rows(e, b) + m * b.stride + n, first_of<T>(e, n, sums[i]));
        } else {
          store(e.parts + (blockIdx.y * in.pair_count + begin + m) * width + n, sums[i]);
        }
      }
    }
  }
  if (!all) {
    // Who arrives last finds the parts of all others.
    int *last = reinterpret_cast<int *>(shared_memory());
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64_t blocks = own_tiles * e.column_blocks * e.splits;
      *last = atomicAdd(e.arrived + user, 1) == static_cast<int32_t>(blocks - 1);
    }
    __syncthreads();
    const bool mine = *last != 0;
    __syncthreads();  // the memory that told is used again
    if (!mine) return;
    __threadfence();
    add_parts(e, b, begin, count);
  }
  finish(e, b, user, count);
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
  const int64_t size = in.dtype == FSSA_FLOAT32 ? 4 : 2, pairs = in.pair_count, width = in.encoder.latent_width;
  const bool attention = in.encoder.pooling == FSSA_POOL_ATTENTION;
  e.splits = larger(1, smaller(MOST_SPLITS, in.encoder.embedding_width / CHUNK));
  e.chunk = larger(1, divide_up(divide_up(in.encoder.embedding_width, e.splits), 128)) * 128;  // whole steps of every dtype
  e.splits = larger(1, divide_up(in.encoder.embedding_width, e.chunk));
  e.parts = static_cast<float *>(take(e.splits * pairs * width * 4));
  e.arrived = static_cast<int32_t *>(take(in.users * 4));
  e.first = take(in.encoder.inner == FSSA_INNER_MLP ? pairs * width * size : 0);
  e.h = take(pairs * width * size);
  e.qk = take(attention ? pairs * 2 * width * size : 0);
  e.norms = static_cast<float *>(take(attention ? in.encoder.heads * pairs * 4 : 0));
  e.shares = static_cast<float *>(take(attention ? in.encoder.heads * pairs * 4 : 0));
  e.mixed = static_cast<float *>(take(attention ? in.users * in.encoder.heads * width * 4 : 0));
  e.vectors = static_cast<float *>(take(in.users * 4 * width * 4));
  return used;
}

template <class T>
void encode(const fssa_context_input &in, bool latent, const void *noise, void *result, void *workspace, void *stream) {
  if (in.users == 0) return;
  Encode e{};
  e.in = in, e.latent = latent, e.noise = noise, e.result = result;
  lay_out(e, workspace);
  clear(e.arrived, static_cast<size_t>(in.users) * 4, stream);
  int64_t size = 0;
  e.room = smaller(MOST_ON_CHIP, divide_up(in.pair_count, PAIRS) * PAIRS);
  for (; e.room >= 0; e.room -= PAIRS) {
    lay_out_on_chip<T>(in, e.room, nullptr, size);
    if (STAGES<T> + size <= most_shared_memory()) break;
    size = 0;
  }
  const bool alone = e.splits == 1 && in.users >= MANY_USERS && e.room > 0;
  e.column_blocks = alone ? 1 : divide_up(in.encoder.latent_width, First<T>::COLUMNS);
  const int64_t tiles = (in.pair_count / PAIRS + in.users) * e.column_blocks;
  const bool whole_pairs = whole_pieces<T>(in.pairs, in.encoder.embedding_width);
  const bool whole_weights = whole_pieces<T>(in.weights.inner0, in.encoder.embedding_width);
  launch("context: encode", encode_kernel<T>,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(e.splits)), THREADS,
         static_cast<size_t>(STAGES<T> + size), stream, false, e, whole_pairs, whole_weights);
}

template <class T, class Tile>
void rows(const fssa_context_rows_args &a, void *stream) {
  const Rows r{a.input.users, a.input.encoder.latent_width, a.bank_width, a.latents, a.modulation, a.modulation_bias,
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
