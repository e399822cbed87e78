// linear, adapt and gate: what a decoder block computes between attention and norms, with weights in panels.
#include "ops.h"
#include "panels.h"
#include "slots.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

template <class T>
void linear_of(const fssa_linear_args &a) {
  Scratch scratch;
  const auto x = multiplied(scratch, a.threads, rows_of(T{}, a.x), a.rows, a.width);
  const T *bias = static_cast<const T *>(a.bias);
  panels(a.threads, x, a.rows, static_cast<const T *>(a.weight), a.outputs, a.width,
         [&](int64_t m, int64_t n, const float *values, int64_t count) {
           T *y = static_cast<T *>(a.y.data) + m * a.y.stride + n;
           for (int64_t j = 0; j < count; j += WIDTH) {
             const Vec v = load(values + j);  // whole: a panel's sums have room for all of its columns
             store_up_to(y + j, bias ? v + load_up_to(bias + n + j, count - j) : v, count - j);
           }
         });
}

template <class T>
void adapt_of(const fssa_adapt_args &a) {
  const SlotOf slot_of{a.slots};
  // One part after the other, each on all threads: parts may have the same y, and are then added in the order given.
  for (int64_t i = 0; i < a.part_count; i++) {
    const fssa_adapt_part &part = a.parts[i];
    const Rows<T> raw = rows_of(T{}, part.hidden);
    const Modulation<T> modulation(part.modulation);
    Scratch scratch;
    using X = typename Multiplied<T>::type;
    X *hidden = reinterpret_cast<X *>(scratch.floats(a.rows * part.rank));
    for (int64_t n = 0; n < a.rows; n++) {
      const int64_t slot = slot_of(n);
      for (int64_t r = 0; r < part.rank; r += WIDTH) {
        const int64_t count = part.rank - r;
        const Vec scale = modulation.scale(slot, r, count), shift = modulation.shift(slot, r, count);
        store_up_to(hidden + n * part.rank + r, fma(load_up_to(raw(n) + r, count), scale, shift), count);
      }
    }
    panels(a.threads, Rows<X>{hidden, part.rank}, a.rows, static_cast<const T *>(part.b), part.width, part.rank,
           [&](int64_t m, int64_t n, const float *values, int64_t count) {
             T *y = static_cast<T *>(part.y.data) + m * part.y.stride + n;
             for (int64_t j = 0; j < count; j += WIDTH) {
               store_up_to(y + j, load_up_to(y + j, count - j) + load(values + j), count - j);
             }
           });
  }
}

// x / (1 + e^-u). Of |u|, so that the exponential cannot overflow: 1 / (1 + e^-u) = e^u / (1 + e^u).
FSSA_INLINE Vec times_sigmoid(Vec x, Vec u) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  const Vec e = exp_nonpositive(zero - max(zero - u, u));  // e^-|u|
  return x * (u < zero ? e : one) / (one + e);
}

template <class T>
void gate_of(const fssa_gate_args &a) {
  constexpr int64_t TASK_ELEMENTS = 1 << 14;
  const int64_t step = greater(TASK_ELEMENTS / greater(a.width, 1), 1);
  parallel(a.threads, (a.rows + step - 1) / step, [&](int64_t task) {
    for (int64_t n = task * step; n < lesser(a.rows, task * step + step); n++) {
      const T *gate = rows_of(T{}, a.gate)(n), *up = rows_of(T{}, a.up)(n);
      T *y = static_cast<T *>(a.y.data) + n * a.y.stride;
      for (int64_t d = 0; d < a.width; d += WIDTH) {
        const int64_t count = a.width - d;
        const Vec x = load_up_to(gate + d, count);
        Vec u = x;  // silu is x sigmoid(x)
        if (a.activation == FSSA_GELU_TANH) {  // 0.5 x (1 + tanh(t)) = x sigmoid(2 t)
          u = fma(x * x * x, splat(0.044715f), x) * splat(1.5957691216f);
        }
        store_up_to(y + d, times_sigmoid(x, u) * load_up_to(up + d, count), count);
      }
    }
  });
}

}  // namespace

void linear(const fssa_linear_args &a) {
  with_type(a.dtype, [&](auto type) { linear_of<decltype(type)>(a); });
}

void adapt(const fssa_adapt_args &a) {
  with_type(a.dtype, [&](auto type) { adapt_of<decltype(type)>(a); });
}

void gate(const fssa_gate_args &a) {
  with_type(a.dtype, [&](auto type) { gate_of<decltype(type)>(a); });
}

}  // namespace FSSA_ISA
}  // namespace fssa
