// Matrix products, accumulated in float32. Two forms, after how the operands lie in memory:
//
//   dots:       out[m, n] = sum_k x[m, k] w[n, k]   both contiguous along k: a linear layer, weights as torch holds them
//   axpys:      out[m, n] = sum_k a[m, k] b[k, n]   contiguous along n; a is any float32 matrix, also a transposed one
//
// Each output element is summed in an order that depends on K alone. Blocks, tiles and tails are a matter of speed: all
// of them do the same operations for an element. Packing a block (copying it, as float32, to where the cache likes it)
// changes no value.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fssa {
namespace FSSA_ISA {

#if defined(__AVX512F__)
constexpr int DOT_ROWS = 6, AXPY_ROWS = 8;
#elif defined(__AVX2__)
constexpr int DOT_ROWS = 3, AXPY_ROWS = 6;
#else
constexpr int DOT_ROWS = 2, AXPY_ROWS = 4;
#endif

constexpr int DOT_COLUMNS = 4;
constexpr int64_t DOT_DEPTH = 640;  // four rows of w and a tile's rows of x, this long, fit the first cache
constexpr int64_t DOT_PACK_ROWS = 16, DOT_PACK_COLUMNS = 48;  // from here on packing x pays
constexpr int64_t AXPY_WIDTH = 2 * WIDTH;
constexpr int64_t AXPY_DEPTH = 64;  // so many terms are summed before they join the sum of those before them

// A row-major matrix whose rows lie `stride` apart.
template <class T>
struct Rows {
  const T *data;
  int64_t stride;
  const T *operator()(int64_t row) const { return data + row * stride; }
};
template <class T>
FSSA_INLINE Rows<T> rows_of(T, const void *data, int64_t stride) {
  return {static_cast<const T *>(data), stride};
}
template <class T>
FSSA_INLINE Rows<T> rows_of(T, const fssa_input &input) {
  return {static_cast<const T *>(input.data), input.stride};
}

// ---------------------------------------------------------------- dots

template <int ROWS, class X, class W>
FSSA_INLINE void dot_tile(const X *const *x, const W *const *w, int64_t depth, float *out, int64_t out_stride, bool add) {
  Vec sums[ROWS][DOT_COLUMNS] = {};
  const int64_t whole = depth / WIDTH * WIDTH;
  for (int64_t k = 0; k < whole; k += WIDTH) {
    Vec rows[ROWS];
    FSSA_UNROLL for (int i = 0; i < ROWS; i++) rows[i] = load(x[i] + k);
    FSSA_UNROLL for (int j = 0; j < DOT_COLUMNS; j++) {
      const Vec column = load(w[j] + k);
      FSSA_UNROLL for (int i = 0; i < ROWS; i++) sums[i][j] = fma(rows[i], column, sums[i][j]);
    }
  }
  if (whole < depth) {
    FSSA_UNROLL for (int j = 0; j < DOT_COLUMNS; j++) {
      const Vec column = load(w[j] + whole, depth - whole);
      FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
        sums[i][j] = fma(load(x[i] + whole, depth - whole), column, sums[i][j]);
      }
    }
  }
  FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
    store_sums(out + i * out_stride, sums[i][0], sums[i][1], sums[i][2], sums[i][3], add);
  }
}

// Whether rows of X and of W are multiplied as they are, two elements a lane, rather than each made a float first.
template <class X, class W>
struct InPairs {
  static constexpr bool value = false;
};

#if defined(__AVX512BF16__)
template <>
struct InPairs<bfloat16, bfloat16> {
  static constexpr bool value = true;
};

FSSA_INLINE __m512bh load_pairs(const bfloat16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
FSSA_INLINE __m512bh load_pairs(const bfloat16 *p, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1), p);
}

// Products are exact, sums float32; numbers too small to be normal count as zero.
template <int ROWS>
FSSA_INLINE void dot_tile(
    const bfloat16 *const *x, const bfloat16 *const *w, int64_t depth, float *out, int64_t out_stride, bool add) {
  constexpr int64_t STEP = 2 * WIDTH;
  Vec sums[ROWS][DOT_COLUMNS] = {};
  const int64_t whole = depth / STEP * STEP;
  for (int64_t k = 0; k < whole; k += STEP) {
    __m512bh rows[ROWS];
    FSSA_UNROLL for (int i = 0; i < ROWS; i++) rows[i] = load_pairs(x[i] + k);
    FSSA_UNROLL for (int j = 0; j < DOT_COLUMNS; j++) {
      const __m512bh column = load_pairs(w[j] + k);
      FSSA_UNROLL for (int i = 0; i < ROWS; i++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], rows[i], column);
    }
  }
  if (whole < depth) {
    FSSA_UNROLL for (int j = 0; j < DOT_COLUMNS; j++) {
      const __m512bh column = load_pairs(w[j] + whole, depth - whole);
      FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], load_pairs(x[i] + whole, depth - whole), column);
      }
    }
  }
  FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
    store_sums(out + i * out_stride, sums[i][0], sums[i][1], sums[i][2], sums[i][3], add);
  }
}
#endif

template <class T>
T element_of(const T *);

// `count` rows (at most DOT_ROWS) by up to four columns.
template <int ROWS, class X, class W>
static void dot_rows(
    int64_t count, const X *const *x, const W *const *w, int64_t depth, int64_t columns, float *out, int64_t out_stride,
    bool add) {
  if constexpr (ROWS > 1) {
    if (count < ROWS) return dot_rows<ROWS - 1>(count, x, w, depth, columns, out, out_stride, add);
  }
  if (columns == DOT_COLUMNS) return dot_tile<ROWS>(x, w, depth, out, out_stride, add);
  float tile[ROWS * DOT_COLUMNS];
  dot_tile<ROWS>(x, w, depth, tile, DOT_COLUMNS, false);
  for (int i = 0; i < ROWS; i++) {
    for (int64_t j = 0; j < columns; j++) {
      float *element = out + i * out_stride + j;
      *element = add ? *element + tile[i * DOT_COLUMNS + j] : tile[i * DOT_COLUMNS + j];
    }
  }
}

template <class X, class W>
static void dot_block(
    const X *const *x, int64_t rows, const Rows<W> &w, int64_t columns, int64_t k, int64_t depth, float *out,
    int64_t out_stride, bool add) {
  for (int64_t n = 0; n < columns; n += DOT_COLUMNS) {
    const int64_t width = lesser(DOT_COLUMNS, columns - n);
    const W *points[DOT_COLUMNS];
    for (int64_t j = 0; j < DOT_COLUMNS; j++) points[j] = w(n + lesser(j, width - 1)) + k;
    for (int64_t m = 0; m < rows; m += DOT_ROWS) {
      dot_rows<DOT_ROWS>(
          lesser(DOT_ROWS, rows - m), x + m, points, depth, width, out + m * out_stride + n, out_stride, add);
    }
  }
}

// out[m, n] (+)= sum_k x(m)[k] w(n)[k], by the calling thread; x is anything that gives a row's address.
template <class XRows, class W>
static void dots(
    const XRows &x, int64_t rows, const Rows<W> &w, int64_t columns, int64_t depth, float *out, int64_t out_stride,
    bool add = false) {
  using X = decltype(x(0));
  constexpr int64_t BLOCK = 96;
  constexpr bool in_pairs = InPairs<decltype(element_of(x(0))), W>::value;
  constexpr int64_t most = in_pairs ? 2 * DOT_DEPTH : DOT_DEPTH;
  const int64_t blocks = (depth + most - 1) / most;
  const int64_t step = blocks ? ((depth + blocks - 1) / blocks + 15) / 16 * 16 : 1;
  if (depth == 0 && !add) {
    for (int64_t m = 0; m < rows; m++) memset(out + m * out_stride, 0, columns * sizeof(float));
  }
  for (int64_t m = 0; m < rows; m += BLOCK) {
    const int64_t count = lesser(BLOCK, rows - m);
    const bool pack = !in_pairs && count >= DOT_PACK_ROWS && columns >= DOT_PACK_COLUMNS;
    Scratch scratch;
    float *packed = pack ? scratch.floats(BLOCK * step) : nullptr;
    for (int64_t k = 0; k < depth; k += step) {
      const int64_t length = lesser(step, depth - k);
      if (pack) {
        const float *points[BLOCK];
        for (int64_t i = 0; i < count; i++) {
          float *row = packed + i * step;
          points[i] = row;
          for (int64_t j = 0; j < length; j += WIDTH) {
            store_up_to(row + j, load_up_to(x(m + i) + k + j, length - j), length - j);
          }
        }
        dot_block(points, count, w, columns, k, length, out + m * out_stride, out_stride, add || k > 0);
      } else {
        X points[BLOCK];
        for (int64_t i = 0; i < count; i++) points[i] = x(m + i) + k;
        dot_block(points, count, w, columns, k, length, out + m * out_stride, out_stride, add || k > 0);
      }
    }
  }
}

// ---------------------------------------------------------------- axpys

// A float32 matrix with any strides.
struct Grid {
  const float *data;
  int64_t row, column;
};

// tile[i, j] = sum_k a[i, k] b[k, j] for ROWS rows and AXPY_WIDTH columns.
template <int ROWS, class B>
FSSA_INLINE void axpy_tile(const Grid &a, const B *b, int64_t b_stride, int64_t depth, float *tile) {
  const float *factors = a.data;
  int64_t k = 0;
  do {  // once also where there is nothing to sum
    Vec sums[ROWS][2] = {};
    const int64_t end = lesser(depth, k + AXPY_DEPTH);
    const bool add = k > 0;
    for (; k < end; k++, factors += a.column, b += b_stride) {
      const Vec left = load(b), right = load(b + WIDTH);
      FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
        const Vec factor = splat(factors[i * a.row]);
        sums[i][0] = fma(factor, left, sums[i][0]);
        sums[i][1] = fma(factor, right, sums[i][1]);
      }
    }
    FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
      float *row = tile + i * AXPY_WIDTH;
      store(row, add ? load(row) + sums[i][0] : sums[i][0]);
      store(row + WIDTH, add ? load(row + WIDTH) + sums[i][1] : sums[i][1]);
    }
  } while (k < depth);
}

// The same for `rows` rows, at most ROWS.
template <int ROWS, class B>
static void axpy_rows(int64_t rows, const Grid &a, const B *b, int64_t b_stride, int64_t depth, float *tile) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return axpy_rows<ROWS - 1>(rows, a, b, b_stride, depth, tile);
  }
  axpy_tile<ROWS>(a, b, b_stride, depth, tile);
}

// emit(m, n, v, count) takes the elements out[m, n ..] of which `count` (at least one, perhaps more than WIDTH: then all
// of v) are wanted: v = sum_k a[m, k] b(k)[n ..], n from `begin` to `end`.
template <class BRows, class Emit>
static void axpys(
    const Grid &a, int64_t rows, int64_t depth, const BRows &b, int64_t begin, int64_t end, const Emit &emit) {
  Scratch scratch;
  float *packed = nullptr;
  float tile[AXPY_ROWS * AXPY_WIDTH];
  for (int64_t n = begin; n < end; n += AXPY_WIDTH) {
    const int64_t columns = lesser(AXPY_WIDTH, end - n);
    const bool in_place = b.stride && rows <= AXPY_ROWS && columns == AXPY_WIDTH;
    if (!in_place && !packed) packed = scratch.floats(depth * AXPY_WIDTH);
    for (int64_t k = 0; k < depth && !in_place; k++) {
      const auto *row = b(k) + n;
      float *to = packed + k * AXPY_WIDTH;
      store(to, load_up_to(row, columns));
      store(to + WIDTH, columns > WIDTH ? load_up_to(row + WIDTH, columns - WIDTH) : splat(0.0f));
    }
    for (int64_t m = 0; m < rows; m += AXPY_ROWS) {
      const int64_t height = lesser(AXPY_ROWS, rows - m);
      const Grid part{a.data + m * a.row, a.row, a.column};
      if (in_place) {
        axpy_rows<AXPY_ROWS>(height, part, b(0) + n, b.stride, depth, tile);
      } else {
        axpy_rows<AXPY_ROWS>(height, part, static_cast<const float *>(packed), AXPY_WIDTH, depth, tile);
      }
      for (int64_t i = 0; i < height; i++) {
        emit(m + i, n, load(tile + i * AXPY_WIDTH), columns);
        if (columns > WIDTH) emit(m + i, n + WIDTH, load(tile + i * AXPY_WIDTH + WIDTH), columns - WIDTH);
      }
    }
  }
}

// A matrix of adjacent columns, whose elements may be rounded to the dtype of what they are multiplied with.
struct Rounded : Grid {};

#if defined(__AVX512BF16__)
// to[2 j] = even[j] and to[2 j + 1] = odd[j], or 0 where there is no odd row, for AXPY_WIDTH columns: 0 from `count` on.
FSSA_INLINE void interleave(const bfloat16 *even, const bfloat16 *odd, int64_t count, bfloat16 *to) {
  struct Order {
    int16_t from[2][32];
    constexpr Order() : from() {
      for (int16_t i = 0; i < 64; i++) from[i / 32][i % 32] = static_cast<int16_t>(i / 2 + i % 2 * 32);
    }
  };
  alignas(64) static constexpr Order order;
  const __mmask32 mask = count < AXPY_WIDTH ? static_cast<__mmask32>((1u << count) - 1) : ~__mmask32{0};
  const __m512i x = _mm512_maskz_loadu_epi16(mask, even);
  const __m512i y = odd ? _mm512_maskz_loadu_epi16(mask, odd) : _mm512_setzero_si512();
  for (int half = 0; half < 2; half++) {
    const __m512i from = _mm512_load_si512(order.from[half]);
    _mm512_storeu_si512(to + half * AXPY_WIDTH, _mm512_permutex2var_epi16(x, from, y));
  }
}

// tile[i, j] = sum_k a[i, k] b[k, j] for ROWS rows and AXPY_WIDTH columns, two k a lane.
template <int ROWS>
static void axpy_pairs(
    int64_t rows, const bfloat16 *a, int64_t a_stride, const bfloat16 *b, int64_t depth, float *tile) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return axpy_pairs<ROWS - 1>(rows, a, a_stride, b, depth, tile);
  }
  Vec sums[ROWS][2] = {};
  for (int64_t k = 0; k < depth; k += 2, b += 2 * AXPY_WIDTH) {
    const __m512bh left = load_pairs(b), right = load_pairs(b + AXPY_WIDTH);
    FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
      int pair;
      memcpy(&pair, a + i * a_stride + k, sizeof(pair));
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], factor, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], factor, right);
    }
  }
  FSSA_UNROLL for (int i = 0; i < ROWS; i++) {
    store(tile + i * AXPY_WIDTH, sums[i][0]);
    store(tile + i * AXPY_WIDTH + WIDTH, sums[i][1]);
  }
}

// axpys, with a's elements rounded to bfloat16.
template <class Emit>
static void axpys(
    const Rounded &a, int64_t rows, int64_t depth, const Rows<bfloat16> &b, int64_t begin, int64_t end,
    const Emit &emit) {
  const int64_t even = (depth + 1) / 2 * 2;
  Scratch scratch;
  bfloat16 *factors = reinterpret_cast<bfloat16 *>(scratch.floats(rows * even / 2));
  for (int64_t m = 0; m < rows; m++) {
    bfloat16 *row = factors + m * even;
    for (int64_t k = 0; k < depth; k += WIDTH) store_up_to(row + k, load_up_to(a.data + m * a.row + k, depth - k), depth - k);
    if (depth < even) row[depth] = bfloat16{};
  }
  // Columns side by side, and of each the elements of two rows of b.
  bfloat16 *packed = reinterpret_cast<bfloat16 *>(scratch.floats(even / 2 * AXPY_WIDTH));
  float tile[AXPY_ROWS * AXPY_WIDTH];
  for (int64_t n = begin; n < end; n += AXPY_WIDTH) {
    const int64_t columns = lesser(AXPY_WIDTH, end - n);
    for (int64_t k = 0; k < even; k += 2) {
      interleave(b(k) + n, k + 1 < depth ? b(k + 1) + n : nullptr, columns, packed + k * AXPY_WIDTH);
    }
    for (int64_t m = 0; m < rows; m += AXPY_ROWS) {
      const int64_t height = lesser(AXPY_ROWS, rows - m);
      axpy_pairs<AXPY_ROWS>(height, factors + m * even, even, packed, even, tile);
      for (int64_t i = 0; i < height; i++) {
        emit(m + i, n, load(tile + i * AXPY_WIDTH), columns);
        if (columns > WIDTH) emit(m + i, n + WIDTH, load(tile + i * AXPY_WIDTH + WIDTH), columns - WIDTH);
      }
    }
  }
}
#endif

// emit for a matrix of float32, begun anew or added to.
struct Into {
  float *data;
  int64_t stride;
  bool add;
  void operator()(int64_t m, int64_t n, Vec v, int64_t count) const {
    float *out = data + m * stride + n;
    store_up_to(out, add ? load_up_to(out, count) + v : v, count);
  }
};

// ---------------------------------------------------------------- over the threads

constexpr double TASK_WORK = 5e5;  // multiplications that are worth a task of their own: some ten microseconds

// Rows of a task, about so many and at least one, such that every thread gets as many tasks.
inline int64_t even_share(int64_t rows, int threads, int64_t about) {
  const int64_t tasks = threads * greater(1, (rows + threads * about / 2) / (threads * about));
  return greater(1, (rows + tasks - 1) / tasks);
}

// A matrix cut into tasks, along one side or the other.
struct Pieces {
  int64_t tasks, rows, columns;  // of a task
  int64_t across;                // tasks side by side

  Pieces(int64_t m, int64_t n, int64_t depth, int threads) {
    const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(depth);
    int64_t wanted = lesser(4 * threads, static_cast<int64_t>(work / TASK_WORK) + 1);
    if (threads <= 1) wanted = 1;
    rows = m, columns = n;
    if (wanted > 1 && m >= 48 * threads) {
      rows = even_share(m, threads, greater(48, m / wanted));
    } else if (wanted > 1) {
      columns = ((n + wanted - 1) / wanted + AXPY_WIDTH - 1) / AXPY_WIDTH * AXPY_WIDTH;
    }
    across = columns ? (n + columns - 1) / columns : 0;
    tasks = across * (rows ? (m + rows - 1) / rows : 0);
  }
};

// dots() by several threads.
template <class XRows, class W>
static void dots_parallel(
    int threads, const XRows &x, int64_t rows, const Rows<W> &w, int64_t columns, int64_t depth, float *out,
    int64_t out_stride) {
  const Pieces pieces(rows, columns, depth, threads);
  parallel(threads, pieces.tasks, [&](int64_t task) {
    const int64_t m = task / pieces.across * pieces.rows, n = task % pieces.across * pieces.columns;
    const auto shifted = [&](int64_t i) { return x(m + i); };
    dots(shifted, lesser(pieces.rows, rows - m), Rows<W>{w(n), w.stride}, lesser(pieces.columns, columns - n), depth,
         out + m * out_stride + n, out_stride);
  });
}

// axpys() by several threads.
template <class A, class BRows, class Emit>
static void axpys_parallel(
    int threads, const A &a, int64_t rows, int64_t depth, const BRows &b, int64_t columns, const Emit &emit) {
  const Pieces pieces(rows, columns, depth, threads);
  parallel(threads, pieces.tasks, [&](int64_t task) {
    const int64_t m = task / pieces.across * pieces.rows, n = task % pieces.across * pieces.columns;
    A part = a;
    part.data += m * a.row;
    axpys(part, lesser(pieces.rows, rows - m), depth, b, n, lesser(n + pieces.columns, columns),
          [&](int64_t i, int64_t j, Vec v, int64_t count) { emit(m + i, j, v, count); });
  });
}

// out[n] += sum over rows of x[m, n], float32, in the order of the rows.
FSSA_INLINE void add_rows(const float *x, int64_t stride, int64_t rows, int64_t columns, float *out) {
  for (int64_t n = 0; n < columns; n += WIDTH) {
    const int64_t count = columns - n;
    LongSum total;
    for (int64_t m = 0; m < rows; m++) total.add(load_up_to(x + m * stride + n, count));
    store_up_to(out + n, load_up_to(out + n, count) + total.total(), count);
  }
}

}  // namespace FSSA_ISA
}  // namespace fssa
