// The CUDA ops as the Python module fssa_fast._cuda: one function an op, pointers as integers, tuples as in ../bindings.cpp.
// `workspace` is asked for memory: called with a number of bytes it gives an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "interface.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Matrix = std::pair<Address, int64_t>;                          // where it begins, and the distance of its rows
using Slots = std::tuple<Address, bool, int64_t, int64_t, int64_t>;  // address, is_int64, count, rows_per_slot, limit
using Part = std::tuple<int64_t, int64_t, Matrix, Matrix, Matrix>;   // rank, width, y, b, the result
// N, U, E, H, Z, heads, inner, pooling
using Encoder = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int>;

void raise(fssa_status status) {
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
fssa_input in(const Matrix &m) { return {at(m.first), m.second}; }
fssa_output out(const Matrix &m) { return {at<void>(m.first), m.second}; }
fssa_dtype dtype(int code) { return static_cast<fssa_dtype>(code); }
fssa_slots slots_of(const Slots &s) {
  return {at(std::get<0>(s)), std::get<1>(s), std::get<2>(s), std::get<3>(s), std::get<4>(s)};
}

fssa_context_input context_input(int code, const Encoder &e, Address pairs, Address choices, Address offsets,
                                 const std::vector<Address> &w) {
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
          1};
}

void *memory(const py::function &workspace, int64_t bytes) { return at<void>(workspace(bytes).cast<Address>()); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA ops of fssa_fast (csrc/cuda/interface.h), by addresses; fssa_fast.backends.cuda gives it tensors.";

  m.def("film", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &scale, const Matrix &shift,
                   const Slots &slots, const Matrix &y, Address stream) {
    const fssa_film_args args{dtype(code), rows, width, in(x), in(scale), in(shift), slots_of(slots), out(y), 1};
    raise(fssa_cuda_film(&args, at<void>(stream)));
  });
  m.def("film_norm", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &residual,
                        const Matrix &scale, const Matrix &shift, const Slots &slots, Address weight, float eps,
                        const Matrix &hidden, const Matrix &normed, Address stream) {
    const fssa_film_norm_args args{dtype(code), rows,       width, in(x),       in(residual), in(scale), in(shift),
                                   slots_of(slots), at(weight), eps,   out(hidden), out(normed),  1};
    raise(fssa_cuda_film_norm(&args, at<void>(stream)));
  });
  m.def("lora", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &a, const Matrix &gamma,
                   const Matrix &beta, int64_t gamma_column_stride, const Slots &slots, float scaling,
                   const std::vector<Part> &parts, const py::function &workspace, Address stream) {
    std::vector<fssa_lora_part> list;
    list.reserve(parts.size());
    for (const auto &[rank, outputs, y, b, to] : parts) list.push_back({rank, outputs, in(y), in(b), out(to)});
    const fssa_lora_args args{dtype(code), rows, width, in(x), in(a), in(gamma), in(beta), gamma_column_stride,
                              slots_of(slots), scaling, list.data(), static_cast<int64_t>(list.size()), 1};
    raise(fssa_cuda_lora(&args, memory(workspace, fssa_cuda_lora_workspace(&args)), at<void>(stream)));
  });
  m.def("context", [](int code, const Encoder &encoder, Address pairs, Address choices, Address offsets,
                      const std::vector<Address> &weights, Address encoded, const py::function &workspace,
                      Address stream) {
    const fssa_context_args args{context_input(code, encoder, pairs, choices, offsets, weights), at<void>(encoded)};
    raise(fssa_cuda_context(&args, memory(workspace, fssa_cuda_context_workspace(&args.input)), at<void>(stream)));
  });
  m.def("context_rows", [](int code, const Encoder &encoder, Address pairs, Address choices, Address offsets,
                           const std::vector<Address> &weights, int bank_code, const Matrix &bank, int64_t bank_width,
                           const Slots &slots, Address modulation, Address modulation_bias, Address noise,
                           Address latents, const py::function &workspace, Address stream) {
    const fssa_context_rows_args args{context_input(code, encoder, pairs, choices, offsets, weights),
                                      dtype(bank_code),
                                      out(bank),
                                      bank_width,
                                      slots_of(slots),
                                      at(modulation),
                                      at(modulation_bias),
                                      at(noise),
                                      at<void>(latents)};
    raise(fssa_cuda_context_rows(&args, memory(workspace, fssa_cuda_context_workspace(&args.input)), at<void>(stream)));
  });
}
