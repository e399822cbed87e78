// film and film_norm: one pass over the rows; the gradients of a user's row are summed in the order of the batch.
#include "matmul.h"
#include "ops.h"
#include "slots.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

constexpr int64_t TASK_ELEMENTS = 1 << 15;  // elements that are worth a task of their own

// Cuts rows of this width into tasks and calls body(first row, end row) for each.
template <class Body>
void over_rows(int threads, int64_t rows, int64_t width, const Body &body) {
  const int64_t step = greater(TASK_ELEMENTS / greater(width, 1), 1);
  parallel(threads, (rows + step - 1) / step, [&](int64_t task) { body(task * step, lesser(rows, task * step + step)); });
}

// x * (1 + scale) + shift
FSSA_INLINE Vec modulated(Vec x, Vec scale, Vec shift) { return fma(x, splat(1.0f) + scale, shift); }

template <class T>
void film_rows(const fssa_film_args &a, int64_t begin, int64_t end) {
  const SlotOf slot_of{a.slots};
  for (int64_t n = begin; n < end; n++) {
    const int64_t slot = slot_of(n);
    const T *x = rows_of(T{}, a.x)(n);
    const T *scale = rows_of(T{}, a.film.scale)(slot), *shift = rows_of(T{}, a.film.shift)(slot);
    T *y = static_cast<T *>(a.y.data) + n * a.y.stride;
    const int64_t whole = a.width / WIDTH * WIDTH, rest = a.width - whole;
    for (int64_t d = 0; d < whole; d += WIDTH) store(y + d, modulated(load(x + d), load(scale + d), load(shift + d)));
    if (rest) {
      store(y + whole, modulated(load(x + whole, rest), load(scale + whole, rest), load(shift + whole, rest)), rest);
    }
  }
}

// One row of film_norm: hidden, in float32, and 1 / sqrt(mean(hidden^2) + eps).
template <class T>
FSSA_INLINE float hidden_row(
    const T *x, const T *residual, const T *scale, const T *shift, int64_t width, float eps, float *hidden) {
  Vec squares[2] = {};  // two sums, so that an addition need not wait for the one before it
  int64_t d = 0;
  const auto step = [&](int64_t at, int64_t count, int which) {
    const Vec joined = load_up_to(x + at, count) + load_up_to(residual + at, count);
    const Vec h = modulated(joined, load_up_to(scale + at, count), load_up_to(shift + at, count));
    store_up_to(hidden + at, h, count);
    squares[which] = fma(h, h, squares[which]);
  };
  for (; d + 2 * WIDTH <= width; d += 2 * WIDTH) {
    step(d, WIDTH, 0);
    step(d + WIDTH, WIDTH, 1);
  }
  if (d < width) step(d, lesser(WIDTH, width - d), 0);
  if (d + WIDTH < width) step(d + WIDTH, width - d - WIDTH, 1);
  return 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(width) + eps);
}

template <class T>
void film_norm_rows(const fssa_film_norm_args &a, int64_t begin, int64_t end) {
  const SlotOf slot_of{a.slots};
  const T *weight = static_cast<const T *>(a.norm.weight);
  Scratch scratch;
  float *row = scratch.floats(a.width);
  for (int64_t n = begin; n < end; n++) {
    const int64_t slot = slot_of(n);
    const float inverse = hidden_row(
        rows_of(T{}, a.x)(n), rows_of(T{}, a.residual)(n), rows_of(T{}, a.film.scale)(slot),
        rows_of(T{}, a.film.shift)(slot), a.width, a.norm.eps, row);
    T *hidden = static_cast<T *>(a.hidden.data) + n * a.hidden.stride;
    T *normed = static_cast<T *>(a.normed.data) + n * a.normed.stride;
    for (int64_t d = 0; d < a.width; d += WIDTH) {
      const int64_t count = a.width - d;
      const Vec h = load_up_to(row + d, count);
      store_up_to(hidden + d, h, count);
      store_up_to(normed + d, h * splat(inverse) * load_up_to(weight + d, count), count);
    }
  }
}

// Cuts the work on dscale and dshift into tasks: a slot's rows, a range of columns. body(slot, first column, end).
template <class Body>
void over_slots(int threads, const Grouped &groups, int64_t slots, int64_t rows, int64_t width, const Body &body) {
  const int64_t columns = rows * width < TASK_ELEMENTS ? greater(width, 1) : 256;
  const int64_t across = (width + columns - 1) / columns;
  // Slots are taken some at a time: most of a large bank's have no row in the batch.
  const int64_t together = greater(1, slots / (8 * threads));
  const int64_t tasks = (slots + together - 1) / together * across;
  parallel(rows * width < TASK_ELEMENTS ? 1 : threads, tasks, [&](int64_t task) {
    const int64_t from = task % across * columns, to = lesser(width, from + columns);
    const int64_t first = task / across * together;
    for (int64_t slot = first; slot < lesser(slots, first + together); slot++) {
      body(slot, groups.rows + groups.begin[slot], groups.begin[slot + 1] - groups.begin[slot], from, to);
    }
  });
}

// One task has all rows of a slot, so that their sum has one order and no other task writes it.
// Writes a slot's columns of dscale and dshift, and its rows' columns of dx. gradient(row, column, count) gives the
// gradient by the modulated value, input(row, column, count) the value before modulation.
template <class T, class Gradient, class Input>
FSSA_INLINE void modulation_backward(
    const int64_t *rows, int64_t count, int64_t slot, int64_t from, int64_t to, const fssa_input &scale_of,
    const fssa_output &dx_of, const fssa_output &dscale_of, const fssa_output &dshift_of, const Gradient &gradient,
    const Input &input) {
  const T *scale = rows_of(T{}, scale_of)(slot);
  T *dscale = static_cast<T *>(dscale_of.data) + slot * dscale_of.stride;
  T *dshift = static_cast<T *>(dshift_of.data) + slot * dshift_of.stride;
  for (int64_t d = from; d < to; d += WIDTH) {
    const int64_t width = to - d;
    LongSum scales, shifts;
    if (count) {
      const Vec factor = splat(1.0f) + load_up_to(scale + d, width);
      for (int64_t i = 0; i < count; i++) {
        const Vec g = gradient(rows[i], d, width);
        store_up_to(static_cast<T *>(dx_of.data) + rows[i] * dx_of.stride + d, g * factor, width);
        scales.add(g * input(rows[i], d, width));
        shifts.add(g);
      }
    }
    store_up_to(dscale + d, scales.total(), width);
    store_up_to(dshift + d, shifts.total(), width);
  }
}

template <class T>
void film_backward_of(const fssa_film_backward_args &a) {
  Scratch scratch;
  const Grouped groups = group_rows(scratch, a.slots, a.rows);
  const Rows<T> grad = rows_of(T{}, a.grad), x = rows_of(T{}, a.x);
  over_slots(
      a.threads, groups, a.slots.limit, a.rows, a.width,
      [&](int64_t slot, const int64_t *rows, int64_t count, int64_t from, int64_t to) {
        modulation_backward<T>(
            rows, count, slot, from, to, a.scale, a.dx, a.dscale, a.dshift,
            [&](int64_t n, int64_t d, int64_t width) { return load_up_to(grad(n) + d, width); },
            [&](int64_t n, int64_t d, int64_t width) { return load_up_to(x(n) + d, width); });
      });
}

template <class T>
void film_norm_backward_of(const fssa_film_norm_backward_args &a) {
  Scratch scratch;
  const SlotOf slot_of{a.slots};
  const Grouped groups = group_rows(scratch, a.slots, a.rows);
  const Rows<T> grad_hidden = rows_of(T{}, a.grad_hidden), grad_normed = rows_of(T{}, a.grad_normed);
  const Rows<T> x = rows_of(T{}, a.x), residual = rows_of(T{}, a.residual);
  const Rows<T> scale = rows_of(T{}, a.film.scale), shift = rows_of(T{}, a.film.shift);
  const T *weight = static_cast<const T *>(a.norm.weight);
  // normed = weight * hidden * inverse, so by hidden: grad_hidden + inverse * weight * grad_normed - pull * hidden,
  // where pull = inverse^3 / D * sum(weight * grad_normed * hidden).
  float *inverse = scratch.floats(a.rows), *pull = scratch.floats(a.rows);
  over_rows(a.threads, a.rows, a.width, [&](int64_t begin, int64_t end) {
    Scratch inner;
    float *hidden = inner.floats(a.width);
    for (int64_t n = begin; n < end; n++) {
      const int64_t slot = slot_of(n);
      inverse[n] = hidden_row(x(n), residual(n), scale(slot), shift(slot), a.width, a.norm.eps, hidden);
      Vec total = splat(0.0f);
      for (int64_t d = 0; d < a.width; d += WIDTH) {
        const int64_t count = a.width - d;
        const Vec weighted = load_up_to(weight + d, count) * load_up_to(grad_normed(n) + d, count);
        total = fma(weighted, load_up_to(hidden + d, count), total);
      }
      pull[n] = inverse[n] * inverse[n] * inverse[n] * (sum(total) / static_cast<float>(a.width));
    }
  });
  const auto joined = [&](int64_t n, int64_t d, int64_t width) {
    return load_up_to(x(n) + d, width) + load_up_to(residual(n) + d, width);
  };
  const auto hidden = [&](int64_t n, int64_t slot, int64_t d, int64_t width) {
    return modulated(joined(n, d, width), load_up_to(scale(slot) + d, width), load_up_to(shift(slot) + d, width));
  };
  over_slots(
      a.threads, groups, a.slots.limit, a.rows, a.width,
      [&](int64_t slot, const int64_t *rows, int64_t count, int64_t from, int64_t to) {
        modulation_backward<T>(
            rows, count, slot, from, to, a.film.scale, a.gradients.dx, a.gradients.dscale, a.gradients.dshift,
            [&](int64_t n, int64_t d, int64_t width) {
              const Vec weighted = load_up_to(weight + d, width) * load_up_to(grad_normed(n) + d, width);
              const Vec g = fma(weighted, splat(inverse[n]), load_up_to(grad_hidden(n) + d, width));
              return fma(hidden(n, slot, d, width), splat(-pull[n]), g);
            },
            joined);
      });
  // weight's gradient sums over all rows, of all slots: tasks are columns, and hidden is computed again, not kept.
  constexpr int64_t COLUMNS = 128;
  parallel(a.threads, (a.width + COLUMNS - 1) / COLUMNS, [&](int64_t task) {
    for (int64_t d = task * COLUMNS; d < lesser(a.width, task * COLUMNS + COLUMNS); d += WIDTH) {
      const int64_t count = lesser(WIDTH, a.width - d);
      LongSum total;
      for (int64_t n = 0; n < a.rows; n++) {
        total.add(load_up_to(grad_normed(n) + d, count) * (hidden(n, slot_of(n), d, count) * splat(inverse[n])));
      }
      store_up_to(static_cast<T *>(a.gradients.dweight) + d, total.total(), count);
    }
  });
}

}  // namespace

void film(const fssa_film_args &a) {
  with_type(a.dtype, [&](auto type) {
    over_rows(a.threads, a.rows, a.width, [&](int64_t from, int64_t to) { film_rows<decltype(type)>(a, from, to); });
  });
}

void film_norm(const fssa_film_norm_args &a) {
  with_type(a.dtype, [&](auto type) {
    over_rows(a.threads, a.rows, a.width, [&](int64_t from, int64_t to) { film_norm_rows<decltype(type)>(a, from, to); });
  });
}

void film_backward(const fssa_film_backward_args &a) {
  with_type(a.dtype, [&](auto type) { film_backward_of<decltype(type)>(a); });
}

void film_norm_backward(const fssa_film_norm_backward_args &a) {
  with_type(a.dtype, [&](auto type) { film_norm_backward_of<decltype(type)>(a); });
}

}  // namespace FSSA_ISA
}  // namespace fssa
