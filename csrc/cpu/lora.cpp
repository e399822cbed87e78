// lora: two products a block of rows, the modulation between them while the hidden row is in the first cache.
#include "matmul.h"
#include "ops.h"
#include "slots.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

template <class Parts>
int64_t total_rank(const Parts *parts, int64_t count) {
  int64_t rank = 0;
  for (int64_t i = 0; i < count; i++) rank += parts[i].rank;
  return rank;
}

// hidden <- gamma * hidden + beta, for one row.
template <class T>
FSSA_INLINE void modulate(const Modulation<T> &modulation, int64_t slot, int64_t rank, float *hidden) {
  for (int64_t r = 0; r < rank; r += WIDTH) {
    const int64_t count = rank - r;
    const Vec h = load_up_to(hidden + r, count);
    store_up_to(hidden + r, fma(h, modulation.scale(slot, r, count), modulation.shift(slot, r, count)), count);
  }
}

// emit for out = y + scaling * v, in the batch's dtype.
template <class T>
struct AddScaled {
  Rows<T> y;
  T *out;
  int64_t stride;
  float scaling;
  void operator()(int64_t m, int64_t n, Vec v, int64_t count) const {
    store_up_to(out + m * stride + n, fma(v, splat(scaling), load_up_to(y(m) + n, count)), count);
  }
};

template <class T>
AddScaled<T> add_scaled(const fssa_lora_part &part, int64_t row, float scaling) {
  return {rows_of(T{}, rows_of(T{}, part.y)(row), part.y.stride),
          static_cast<T *>(part.out.data) + row * part.out.stride, part.out.stride, scaling};
}

template <class T>
void lora_of(const fssa_lora_args &a) {
  const SlotOf slot_of{a.slots};
  const Modulation<T> modulation(a.modulation);
  const Rows<T> x = rows_of(T{}, a.x), down = rows_of(T{}, a.a);
  const int64_t rank = total_rank(a.parts, a.part_count);
  constexpr int64_t BLOCK = 96;
  if (a.threads > 1 && a.rows < BLOCK * a.threads) {  // few rows: the threads share the weights
    Scratch scratch;
    float *hidden = scratch.floats(a.rows * rank);
    dots_parallel(a.threads, x, a.rows, down, rank, a.width, hidden, rank);
    for (int64_t n = 0; n < a.rows; n++) modulate(modulation, slot_of(n), rank, hidden + n * rank);
    int64_t first = 0;  // of the part's ranks: A is one matrix, so that x is read once for all parts
    for (int64_t i = 0; i < a.part_count; first += a.parts[i].rank, i++) {
      const fssa_lora_part &part = a.parts[i];
      axpys_parallel(a.threads, Rounded{{hidden + first, rank, 1}}, a.rows, part.rank, rows_of(T{}, part.b), part.width,
                     add_scaled<T>(part, 0, a.scaling));
    }
    return;
  }
  // Many rows: each thread takes some through both products, and their hidden values stay in its cache. Either way an
  // element is summed in the same order, so that its bits do not depend on how many rows there are.
  const int64_t share = even_share(a.rows, a.threads, BLOCK);
  parallel(a.threads, (a.rows + share - 1) / share, [&](int64_t task) {
    const int64_t begin = task * share, count = lesser(share, a.rows - begin);
    Scratch scratch;
    float *hidden = scratch.floats(count * rank);
    dots([&](int64_t i) { return x(begin + i); }, count, down, rank, a.width, hidden, rank);
    for (int64_t n = 0; n < count; n++) modulate(modulation, slot_of(begin + n), rank, hidden + n * rank);
    int64_t first = 0;
    for (int64_t i = 0; i < a.part_count; first += a.parts[i].rank, i++) {
      const fssa_lora_part &part = a.parts[i];
      axpys(Rounded{{hidden + first, rank, 1}}, count, part.rank, rows_of(T{}, part.b), 0, part.width,
            add_scaled<T>(part, begin, a.scaling));
    }
  });
}

// emit for a matrix in the batch's dtype.
template <class T>
struct Store {
  const fssa_output &to;
  void operator()(int64_t m, int64_t n, Vec v, int64_t count) const {
    store_up_to(static_cast<T *>(to.data) + m * to.stride + n, v, count);
  }
};

template <class T>
void lora_backward_of(const fssa_lora_backward_args &a) {
  const Modulation<T> modulation(a.modulation);
  const Rows<T> x = rows_of(T{}, a.x), down = rows_of(T{}, a.a);
  const int64_t rank = total_rank(a.parts, a.part_count);
  Scratch scratch;
  float *raw = scratch.floats(a.rows * rank), *by_hidden = scratch.floats(a.rows * rank);
  dots_parallel(a.threads, x, a.rows, down, rank, a.width, raw, rank);
  int64_t first = 0;
  for (int64_t i = 0; i < a.part_count; first += a.parts[i].rank, i++) {
    const fssa_lora_backward_part &part = a.parts[i];
    dots_parallel(a.threads, rows_of(T{}, part.grad), a.rows, rows_of(T{}, part.b), part.rank, part.width,
                  by_hidden + first, rank);
  }
  // by_hidden <- scaling * by_hidden; a slot's gamma and beta sum over its rows, in their order.
  // Grouped, so that no two threads or rows add to the same sum, and the bits are the same at every call.
  const Grouped groups = group_rows(scratch, a.slots, a.rows);
  const Vec scaling = splat(a.scaling);
  for (int64_t slot = 0; slot < a.slots.limit; slot++) {
    const int64_t begin = groups.begin[slot], end = groups.begin[slot + 1];
    T *dgamma = static_cast<T *>(a.gradients.dgamma.data) + slot * a.gradients.dgamma.stride;
    T *dbeta = static_cast<T *>(a.gradients.dbeta.data) + slot * a.gradients.dbeta.stride;
    for (int64_t r = 0; r < rank; r += WIDTH) {
      const int64_t count = rank - r;
      LongSum gammas, betas;
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = groups.rows[i] * rank + r;
        const Vec h = load_up_to(raw + at, count), g = load_up_to(by_hidden + at, count) * scaling;
        const Vec scale = modulation.scale(slot, r, count);
        gammas.add(g * h);
        betas.add(g);
        // Both are overwritten where they lie by what the products below take.
        store_up_to(by_hidden + at, g * scale, count);  // from here on: by x a^T
        store_up_to(raw + at, fma(h, scale, modulation.shift(slot, r, count)) * scaling, count);  // scaling * hidden
      }
      store_up_to(dgamma + r, gammas.total(), count);
      store_up_to(dbeta + r, betas.total(), count);
    }
  }
  axpys_parallel(a.threads, Grid{by_hidden, rank, 1}, a.rows, rank, down, a.width, Store<T>{a.gradients.dx});
  // A grid with its strides swapped is the transposed matrix: da = by_hidden^T x, and so for the parts below.
  axpys_parallel(a.threads, Grid{by_hidden, 1, rank}, rank, a.rows, x, a.width, Store<T>{a.gradients.da});
  first = 0;
  for (int64_t i = 0; i < a.part_count; first += a.parts[i].rank, i++) {
    const fssa_lora_backward_part &part = a.parts[i];
    axpys_parallel(a.threads, Grid{raw + first, 1, rank}, part.rank, a.rows, rows_of(T{}, part.grad), part.width,
                   Store<T>{part.db});
  }
}

}  // namespace

void lora(const fssa_lora_args &a) {
  with_type(a.dtype, [&](auto type) { lora_of<decltype(type)>(a); });
}

void lora_backward(const fssa_lora_backward_args &a) {
  with_type(a.dtype, [&](auto type) { lora_backward_of<decltype(type)>(a); });
}

}  // namespace FSSA_ISA
}  // namespace fssa
