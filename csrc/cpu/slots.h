// The slots of a batch's rows, what an adapter does by them, and the rows of a batch grouped by slot.
#pragma once

#include "matmul.h"
#include "parallel.h"

namespace fssa {
namespace FSSA_ISA {

// The ops get dispatch.cpp's copy of the slots, always int64.
struct SlotOf {
  fssa_slots slots;
  int64_t operator()(int64_t row) const {
    return static_cast<const int64_t *>(slots.data)[row / slots.rows_per_slot];
  }
};

// A user's gamma and beta.
template <class T>
struct Modulation {
  Rows<T> gamma, beta;
  int64_t column_stride;

  explicit Modulation(const fssa_modulation &m)
      : gamma(rows_of(T{}, m.gamma)), beta(rows_of(T{}, m.beta)), column_stride(m.gamma_column_stride) {}

  Vec scale(int64_t slot, int64_t r, int64_t count) const {
    return column_stride ? load_up_to(gamma(slot) + r, count) : splat(load_one(gamma(slot)));
  }
  Vec shift(int64_t slot, int64_t r, int64_t count) const {
    return beta.data ? load_up_to(beta(slot) + r, count) : splat(0.0f);
  }
};

// Rows of a batch, those of slot s in order at rows[begin[s]] .. rows[begin[s + 1]].
struct Grouped {
  const int64_t *rows, *begin;
};

// A stable counting sort. Counts are kept two places on: after the running sum begin[s + 1] is where s begins, and having
// been moved past the rows of s it is where s + 1 begins, which is what is given back.
static inline Grouped group_rows(Scratch &scratch, const fssa_slots &slots, int64_t count) {
  const SlotOf slot_of{slots};
  int64_t *begin = scratch.integers(slots.limit + 2), *rows = scratch.integers(count);
  memset(begin, 0, (slots.limit + 2) * sizeof(int64_t));
  for (int64_t n = 0; n < count; n++) begin[slot_of(n) + 2]++;
  for (int64_t s = 2; s < slots.limit + 2; s++) begin[s] += begin[s - 1];
  for (int64_t n = 0; n < count; n++) rows[begin[slot_of(n) + 1]++] = n;
  return {rows, begin};
}

}  // namespace FSSA_ISA
}  // namespace fssa
