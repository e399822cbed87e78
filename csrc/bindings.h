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

// (scale, shift)
using Film = std::pair<Matrix, Matrix>;
inline fssa_film film_of(const Film &f) { return {in(f.first), in(f.second)}; }

// (weight, eps)
using Norm = std::pair<Address, float>;
inline fssa_norm norm_of(const Norm &n) { return {at(n.first), n.second}; }

// (gamma, beta, gamma's column stride)
using Modulation = std::tuple<Matrix, Matrix, int64_t>;
inline fssa_modulation modulation_of(const Modulation &m) {
  return {in(std::get<0>(m)), in(std::get<1>(m)), std::get<2>(m)};
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

// (E, H, Z, heads, inner, pooling)
using Encoder = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int>;
// (dtype, N, U, encoder, pairs, choices, offsets, weights)
using ContextInput =
    std::tuple<int, int64_t, int64_t, Encoder, Address, Address, Address, std::vector<Address>>;
inline fssa_context_input context_input(const ContextInput &given, int threads) {
  const auto &[code, count, users, encoder, pairs, choices, offsets, w] = given;
  const auto &[embedding, latent, encoded, heads, inner, pooling] = encoder;
  if (w.size() != 12) throw py::value_error("weights: expected 12 addresses");
  return {dtype(code),
          count,
          users,
          {embedding, latent, encoded, heads, static_cast<fssa_inner>(inner), static_cast<fssa_pooling>(pooling)},
          at(pairs),
          at<const int64_t>(choices),
          at<const int64_t>(offsets),
          {at(w[0]), at(w[1]), at(w[2]), at(w[3]), at(w[4]), at(w[5]), at(w[6]), at(w[7]), at(w[8]), at(w[9]), at(w[10]),
           at(w[11])},
          threads};
}

// (dtype, rows, their width, the users' slots)
using Bank = std::tuple<int, Matrix, int64_t, Slots>;
// (modulation, its bias, noise, latents)
using Latents = std::tuple<Address, Address, Address, Address>;
inline fssa_context_rows_args context_rows_args(const ContextInput &input, const Bank &bank, const Latents &latents,
                                                int threads) {
  const auto &[code, rows, width, slots] = bank;
  const auto [modulation, bias, noise, to] = latents;
  return {context_input(input, threads), dtype(code), out(rows), width, slots_of(slots), at(modulation), at(bias),
          at(noise), at<void>(to)};
}

}  // namespace fssa::bindings
