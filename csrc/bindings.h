// What the Python modules of the CPU and the CUDA ops share: addresses and tuples as the structs of the C interface, and its
// statuses as Python's exceptions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "fssa.h"

namespace fssa::bindings {

namespace py = pybind11;

using Address = uintptr_t;
using Matrix = std::pair<Address, int64_t>;  // where it begins, and the distance of its rows

inline void raise(fssa_status status) {
  switch (status) {
    case FSSA_OK: return;
    case FSSA_BAD_VALUE: throw py::value_error(fssa_last_error());
    case FSSA_BAD_INDEX: throw py::index_error(fssa_last_error());
    case FSSA_NO_MEMORY: throw std::bad_alloc();
    case FSSA_UNSUPPORTED: break;
  }
  throw std::runtime_error(fssa_last_error());
}

template <class T = const void>
T *at(Address address) {
  return reinterpret_cast<T *>(address);
}
inline fssa_input in(const Matrix &m) { return {at(m.first), m.second}; }
inline fssa_output out(const Matrix &m) { return {at<void>(m.first), m.second}; }
inline fssa_dtype dtype(int code) { return static_cast<fssa_dtype>(code); }

// (address, is_int64, count, rows_per_slot, limit)
using Slots = std::tuple<Address, bool, int64_t, int64_t, int64_t>;
inline fssa_slots slots_of(const Slots &s) {
  return {at(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s), std::get<4>(s)};
}

// (rank, width, y or its gradient, b, the result)
using Part = std::tuple<int64_t, int64_t, Matrix, Matrix, Matrix>;
template <class To>
std::vector<To> parts_of(const std::vector<Part> &parts) {
  std::vector<To> result;
  result.reserve(parts.size());
  for (const auto &[rank, width, y, b, to] : parts) result.push_back({rank, width, in(y), in(b), out(to)});
  return result;
}

// (N, U, E, H, Z, heads, inner, pooling)
using Encoder = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int>;
inline fssa_context_input context_input(int code, const Encoder &e, Address pairs, Address choices, Address offsets,
                                        const std::vector<Address> &w, int threads) {
  if (w.size() != 12) throw py::value_error("weights: expected 12 addresses");
  const auto [count, users, embedding, latent, encoded, heads, inner, pooling] = e;
  return {dtype(code),
          count,
          users,
          embedding,
          latent,
          encoded,
          heads,
          static_cast<fssa_inner>(inner),
          static_cast<fssa_pooling>(pooling),
          at(pairs),
          at<const int64_t>(choices),
          at<const int64_t>(offsets),
          {at(w[0]), at(w[1]), at(w[2]), at(w[3]), at(w[4]), at(w[5]), at(w[6]), at(w[7]), at(w[8]), at(w[9]), at(w[10]),
           at(w[11])},
          threads};
}

}  // namespace fssa::bindings
