// lora: shrink, then expand, which modulates and adds into the projections' outputs; two launches.
//
// D is shared out among blocks in chunks that follow from the width; each writes its part of hidden [splits, rows, R] in
// float32, and expand adds the parts in their order. No atomics: a row's bits do not depend on its batch. Expand may begin
// while shrink runs: it brings its first tile of B, then waits.
#include "product.h"

namespace fssa {
namespace cuda {
namespace {

constexpr int64_t CHUNK = 256, MOST_SPLITS = 16;  // D of a block: CHUNK or more
constexpr int EXPAND_THREADS = 128, EXPAND_COLUMNS = 64;
constexpr int PARTS = 8;  // of one launch of expand

struct Shrink {
  int64_t rows, width, rank, chunk;
  fssa_input x, a;
  float *hidden;
};

struct Expand {
  int64_t rows, rank, splits, first_rank;  // of the first part
  const float *hidden;
  fssa_modulation modulation;
  fssa_slots slots;
  float scaling;
  int32_t part_count;
  fssa_lora_part part[PARTS];
};

int64_t rank_of(const fssa_lora_args &a) {
  int64_t rank = 0;
  for (int64_t i = 0; i < a.part_count; i++) rank += a.parts[i].rank;
  return rank;
}

int64_t chunk_of(int64_t width) {  // whole steps of every dtype
  return larger(1, divide_up(divide_up(width, smaller(MOST_SPLITS, larger(1, width / CHUNK))), 64)) * 64;
}

// Block (rows and ranks, split): its chunk's part of hidden = x A^T.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::THREADS) shrink_kernel(Shrink s, bool whole_x, bool whole_a) {
  let_next_launch_begin();
  const int64_t rank_tiles = divide_up(s.rank, Tile::COLUMNS);
  const int64_t row = blockIdx.x / rank_tiles * Tile::ROWS, rank = blockIdx.x % rank_tiles * Tile::COLUMNS;
  const int64_t split = blockIdx.y, start = split * s.chunk;
  Tile::run(MatrixRows<T>{row_of<T>(s.x, row) + start, s.x.stride, s.rows - row},
            MatrixRows<T>{row_of<T>(s.a, rank) + start, s.a.stride, s.rank - rank}, smaller(s.chunk, s.width - start),
            whole_x, whole_a);
  for (int i = threadIdx.x; i < Tile::ROWS * Tile::COLUMNS; i += Tile::THREADS) {
    const int m = i / Tile::COLUMNS, r = i % Tile::COLUMNS;
    if (row + m < s.rows && rank + r < s.rank) {
      store(s.hidden + (split * s.rows + row + m) * s.rank + rank + r, Tile::sum(m, r));
    }
  }
}

// b[k][n] with n adjacent; otherwise as multiply_slice, for two tiles of 8 columns.
template <class T, int MT>
__device__ __forceinline__ void multiply_slice_across(float (&c)[MT][2][4], const T *a, int a_pitch, const T *b,
                                                      int b_pitch) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t weights[4];
    load_matrices_transposed(weights, b + lane % 16 * b_pitch + lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < MT; i++) {
      uint32_t rows[4];
      load_matrices(rows, a + (16 * i + lane % 16) * a_pitch + lane / 16 * 8);
      multiply_add<T>(c[i][0], rows, weights[0], weights[1]);
      multiply_add<T>(c[i][1], rows, weights[2], weights[3]);
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int k = 0; k < SLICE<T>; k++) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
        const float low = a[(16 * i + g) * a_pitch + k], high = a[(16 * i + g + 8) * a_pitch + k];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float *weights = b + k * b_pitch + 8 * j + 2 * t;
          c[i][j][0] = fmaf(low, weights[0], c[i][j][0]);
          c[i][j][1] = fmaf(low, weights[1], c[i][j][1]);
          c[i][j][2] = fmaf(high, weights[0], c[i][j][2]);
          c[i][j][3] = fmaf(high, weights[1], c[i][j][3]);
        }
      }
    }
  }
}

template <class T, int MT>
struct ExpandTile {
  static constexpr int ROWS = 16 * MT, RANKS = sizeof(T) == 2 ? 64 : 32;  // ranks at a time
  static constexpr int B_PITCH = EXPAND_COLUMNS + PIECE<T>, HIDDEN_PITCH = RANKS + PIECE<T>;
  static constexpr int B_TILE = RANKS * B_PITCH;  // two of them: one is brought while one is used
  static constexpr int OUT_PITCH = EXPAND_COLUMNS + 4;
  static constexpr int SHARED = static_cast<int>(
      larger((2 * B_TILE + ROWS * HIDDEN_PITCH) * static_cast<int>(sizeof(T)), ROWS * OUT_PITCH * sizeof(float)));
  static_assert(SHARED <= MOST_SHARED, "too much shared memory");
};

// Block (columns of one part, rows): out = y + scaling * (gamma * hidden + beta) B. A warp has 16 columns and all rows.
template <class T, int MT>
__global__ void __launch_bounds__(EXPAND_THREADS) expand_kernel(Expand e) {
  using Tile = ExpandTile<T, MT>;
  T *b_tiles = reinterpret_cast<T *>(shared_memory()), *modulated = b_tiles + 2 * Tile::B_TILE;
  int64_t tile = blockIdx.x, offset = e.first_rank;
  int i = 0;
  while (tile >= divide_up(e.part[i].width, EXPAND_COLUMNS)) {
    tile -= divide_up(e.part[i].width, EXPAND_COLUMNS);
    offset += e.part[i++].rank;
  }
  const fssa_lora_part &part = e.part[i];
  const int64_t column = tile * EXPAND_COLUMNS, columns = smaller(EXPAND_COLUMNS, part.width - column);
  const int64_t row = static_cast<int64_t>(blockIdx.y) * Tile::ROWS;
  const int rows = static_cast<int>(smaller(Tile::ROWS, e.rows - row)), warp = threadIdx.x / 32;
  constexpr int PIECES = EXPAND_COLUMNS / PIECE<T>;

  // Ranks beyond the last of a slice are zeros on both sides.
  const bool whole_b = whole_pieces<T>(part.b.data, part.b.stride);
  const auto padded = [&](int64_t start) {
    return static_cast<int>(smaller(Tile::RANKS, divide_up(part.rank - start, SLICE<T>) * SLICE<T>));
  };
  const auto bring = [&](int64_t start) {
    T *to = b_tiles + start / Tile::RANKS % 2 * Tile::B_TILE;
    for (int p = threadIdx.x; p < padded(start) * PIECES; p += EXPAND_THREADS) {
      const int r = p / PIECES, at = p % PIECES * PIECE<T>;
      const int64_t left = start + r < part.rank ? columns - at : 0;
      copy_piece(to + r * Tile::B_PITCH + at,
                 left > 0 ? row_of<T>(part.b, start + r) + column + at : static_cast<const T *>(part.b.data), left,
                 whole_b);
    }
  };

  bring(0);
  copy_commit();
  wait_for_launch_before();
  float c[MT][2][4] = {};
  for (int64_t start = 0; start < part.rank; start += Tile::RANKS) {
    if (start + Tile::RANKS < part.rank) bring(start + Tile::RANKS);
    copy_commit();
    const int ranks = padded(start);
    for (int p = threadIdx.x; p < Tile::ROWS * ranks; p += EXPAND_THREADS) {
      const int m = p / ranks, r = p % ranks;
      float value = 0.0f;
      if (m < rows && start + r < part.rank) {
        const int64_t rank = offset + start + r, slot = slot_of(e.slots, row + m);
        const float *hidden = e.hidden + (row + m) * e.rank + rank;
#pragma unroll 4
        for (int64_t split = 0; split < e.splits; split++) value += load(hidden + split * e.rows * e.rank);
        value *= to_float(load(row_of<T>(e.modulation.gamma, slot) + rank * e.modulation.gamma_column_stride));
        if (e.modulation.beta.data != nullptr) value += to_float(load(row_of<T>(e.modulation.beta, slot) + rank));
      }
      modulated[m * Tile::HIDDEN_PITCH + r] = from_float<T>(value);
    }
    copy_wait<1>();
    __syncthreads();  // both factors are here for all threads
    const T *b = b_tiles + start / Tile::RANKS % 2 * Tile::B_TILE + warp * 16;
    for (int k = 0; k < ranks; k += SLICE<T>) {
      multiply_slice_across<T, MT>(c, modulated + k, Tile::HIDDEN_PITCH, b + k * Tile::B_PITCH, Tile::B_PITCH);
    }
    __syncthreads();  // nobody reads the factors any more
  }
  copy_wait<0>();
  __syncthreads();

  // Through shared memory, so that y is read and written in whole pieces.
  float *out = reinterpret_cast<float *>(shared_memory());
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float *to = out + (16 * m + 8 * half + g) * Tile::OUT_PITCH + warp * 16 + 8 * j + 2 * t;
        to[0] = c[m][j][2 * half];
        to[1] = c[m][j][2 * half + 1];
      }
    }
  }
  __syncthreads();
  const bool whole = whole_pieces<T>(part.y.data, part.y.stride) && whole_pieces<T>(part.out.data, part.out.stride);
  for (int p = threadIdx.x; p < rows * PIECES; p += EXPAND_THREADS) {
    const int m = p / PIECES, at = p % PIECES * PIECE<T>;
    if (at >= columns) continue;
    float y[PIECE<T>];
    load_piece(y, row_of<T>(part.y, row + m) + column + at, columns - at, whole);
#pragma unroll
    for (int n = 0; n < PIECE<T>; n++) y[n] = fmaf(e.scaling, out[m * Tile::OUT_PITCH + at + n], y[n]);
    store_piece(row_of<T>(part.out, row + m) + column + at, y, columns - at, whole);
  }
}

template <class T, class Tile>
void shrink(const fssa_lora_args &a, int64_t rank, float *hidden, void *stream) {
  const int64_t chunk = chunk_of(a.width);
  const bool whole_x = whole_pieces<T>(a.x.data, a.x.stride), whole_a = whole_pieces<T>(a.a.data, a.a.stride);
  const int64_t tiles = divide_up(a.rows, Tile::ROWS) * divide_up(rank, Tile::COLUMNS);
  launch("lora: shrink", shrink_kernel<T, Tile>,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(divide_up(a.width, chunk))), Tile::THREADS, Tile::SHARED,
         stream, false, Shrink{a.rows, a.width, rank, chunk, a.x, a.a, hidden}, whole_x, whole_a);
}

template <class T, int MT>
void expand(const fssa_lora_args &a, int64_t rank, const float *hidden, void *stream) {
  using Tile = ExpandTile<T, MT>;
  Expand e{a.rows, rank, divide_up(a.width, chunk_of(a.width)), 0, hidden, a.modulation, a.slots, a.scaling,
           0, {}};
  for (int64_t first = 0; first < a.part_count; first += PARTS) {
    e.part_count = static_cast<int32_t>(smaller(PARTS, a.part_count - first));
    int64_t tiles = 0, ranks = 0;
    for (int i = 0; i < e.part_count; i++) {
      e.part[i] = a.parts[first + i];
      tiles += divide_up(e.part[i].width, EXPAND_COLUMNS);
      ranks += e.part[i].rank;
    }
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(divide_up(a.rows, Tile::ROWS)));
    if (tiles) launch("lora: expand", expand_kernel<T, MT>, grid, EXPAND_THREADS, Tile::SHARED, stream, first == 0, e);
    e.first_rank += ranks;
  }
}

template <class T>
void lora(const fssa_lora_args &a, float *hidden, void *stream) {
  const int64_t rank = rank_of(a);
  const bool many = a.rows > FEW_ROWS;
  if (rank && a.width) {
    if (many) {
      shrink<T, Many<T>>(a, rank, hidden, stream);
    } else if (rank > 32) {
      shrink<T, Few<T, 8>>(a, rank, hidden, stream);
    } else {
      shrink<T, Few<T, 2>>(a, rank, hidden, stream);
    }
  }
  if (many) {
    expand<T, 4>(a, rank, hidden, stream);
  } else {
    expand<T, 1>(a, rank, hidden, stream);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace fssa

using namespace fssa::cuda;

int64_t fssa_cuda_lora_workspace(const fssa_lora_args *args) {
  return divide_up(args->width, chunk_of(args->width)) * args->rows * rank_of(*args) * static_cast<int64_t>(sizeof(float));
}

fssa_status fssa_cuda_lora(const fssa_lora_args *args, void *workspace, void *stream) {
  return guarded([&] {
    if (args->rows == 0) return;
    with_dtype(args->dtype, [&](auto t) { lora<decltype(t)>(*args, static_cast<float *>(workspace), stream); });
  });
}
