// The C interface as a Python module: one function an op, pointers as integers.
#include "bindings.h"

#include <array>
#include <string>

using namespace fssa::bindings;

namespace {

template <class Args>
void call(fssa_status (*op)(const Args *), const Args &args) {
  fssa_status status;
  {
    py::gil_scoped_release release;
    status = op(&args);
  }
  raise(status);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native core of fssa_fast (csrc/fssa.h), by addresses; fssa_fast.backends gives it tensors.";

  m.def("cpu_isa", [] {
    const char *name = nullptr;
    raise(fssa_cpu_isa(&name));
    return std::string(name);
  });
  m.def("set_cpu_isa", [](const std::string &name) { raise(fssa_set_cpu_isa(name.c_str())); });
  m.def("cpu_isa_supported", [](const std::string &name) {
    int32_t supported = 0;
    raise(fssa_cpu_isa_supported(name.c_str(), &supported));
    return supported != 0;
  });

  m.def("cpu_film", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &scale, const Matrix &shift,
                       const Slots &slots, const Matrix &y, int threads) {
    call(fssa_cpu_film,
         fssa_film_args{dtype(code), rows, width, in(x), in(scale), in(shift), slots_of(slots), out(y), threads});
  });
  m.def("cpu_film_norm", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &residual,
                            const Matrix &scale, const Matrix &shift, const Slots &slots, Address weight, float eps,
                            const Matrix &hidden, const Matrix &normed, int threads) {
    call(fssa_cpu_film_norm, fssa_film_norm_args{dtype(code), rows, width, in(x), in(residual), in(scale), in(shift),
                                                 slots_of(slots), at(weight), eps, out(hidden), out(normed), threads});
  });
  m.def("cpu_film_backward", [](int code, int64_t rows, int64_t width, const Matrix &grad, const Matrix &x,
                                const Matrix &scale, const Slots &slots, const Matrix &dx, const Matrix &dscale,
                                const Matrix &dshift, int threads) {
    call(fssa_cpu_film_backward,
         fssa_film_backward_args{dtype(code), rows, width, in(grad), in(x), in(scale), slots_of(slots), out(dx),
                                 out(dscale), out(dshift), threads});
  });
  m.def("cpu_film_norm_backward", [](int code, int64_t rows, int64_t width, const Matrix &grad_hidden,
                                     const Matrix &grad_normed, const Matrix &x, const Matrix &residual,
                                     const Matrix &scale, const Matrix &shift, const Slots &slots, Address weight,
                                     float eps, const Matrix &dx, const Matrix &dscale, const Matrix &dshift,
                                     Address dweight, int threads) {
    call(fssa_cpu_film_norm_backward,
         fssa_film_norm_backward_args{dtype(code), rows, width, in(grad_hidden), in(grad_normed), in(x), in(residual),
                                      in(scale), in(shift), slots_of(slots), at(weight), eps, out(dx), out(dscale),
                                      out(dshift), at<void>(dweight), threads});
  });
  m.def("cpu_lora", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &a, const Matrix &gamma,
                       const Matrix &beta, int64_t gamma_column_stride, const Slots &slots, float scaling,
                       const std::vector<Part> &parts, int threads) {
    const auto list = parts_of<fssa_lora_part>(parts);
    call(fssa_cpu_lora, fssa_lora_args{dtype(code), rows, width, in(x), in(a), in(gamma), in(beta), gamma_column_stride,
                                       slots_of(slots), scaling, list.data(), static_cast<int64_t>(list.size()), threads});
  });
  m.def("cpu_lora_backward", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &a,
                                const Matrix &gamma, const Matrix &beta, int64_t gamma_column_stride,
                                const Slots &slots, float scaling, const std::vector<Part> &parts, const Matrix &dx,
                                const Matrix &da, const Matrix &dgamma, const Matrix &dbeta, int threads) {
    const auto list = parts_of<fssa_lora_backward_part>(parts);
    call(fssa_cpu_lora_backward,
         fssa_lora_backward_args{dtype(code), rows, width, in(x), in(a), in(gamma), in(beta), gamma_column_stride,
                                 slots_of(slots), scaling, list.data(), static_cast<int64_t>(list.size()), out(dx),
                                 out(da), out(dgamma), out(dbeta), threads});
  });
  m.def("cpu_context", [](int code, const Encoder &encoder, Address pairs, Address choices, Address offsets,
                          const std::vector<Address> &weights, Address encoded, int threads) {
    call(fssa_cpu_context,
         fssa_context_args{context_input(code, encoder, pairs, choices, offsets, weights, threads), at<void>(encoded)});
  });
  m.def("cpu_context_rows", [](int code, const Encoder &encoder, Address pairs, Address choices, Address offsets,
                               const std::vector<Address> &weights, int bank_code, const Matrix &bank,
                               int64_t bank_width, const Slots &slots, Address modulation, Address modulation_bias,
                               Address noise, Address latents, int threads) {
    call(fssa_cpu_context_rows,
         fssa_context_rows_args{context_input(code, encoder, pairs, choices, offsets, weights, threads),
                                dtype(bank_code), out(bank), bank_width, slots_of(slots), at(modulation),
                                at(modulation_bias), at(noise), at<void>(latents)});
  });
  m.def("cpu_context_backward", [](int code, const Encoder &encoder, Address pairs, Address choices, Address offsets,
                                   const std::vector<Address> &weights, Address grad, Address dpairs,
                                   const std::vector<Address> &g, int threads) {
    if (g.size() != 12) throw py::value_error("gradients: expected 12 addresses");
    call(fssa_cpu_context_backward,
         fssa_context_backward_args{
             context_input(code, encoder, pairs, choices, offsets, weights, threads), at(grad), at<void>(dpairs),
             {at<void>(g[0]), at<void>(g[1]), at<void>(g[2]), at<void>(g[3]), at<void>(g[4]), at<void>(g[5]),
              at<void>(g[6]), at<void>(g[7]), at<void>(g[8]), at<void>(g[9]), at<void>(g[10]), at<void>(g[11])}});
  });

  m.def("cpu_linear", [](int code, int64_t rows, int64_t width, int64_t outputs, const Matrix &x, Address weight,
                         Address bias, const Matrix &y, int threads) {
    call(fssa_cpu_linear,
         fssa_linear_args{dtype(code), rows, width, outputs, in(x), at(weight), at(bias), out(y), threads});
  });
  // A part: rank, width, hidden, gamma, beta, gamma's column stride, b, y.
  using AdaptPart = std::tuple<int64_t, int64_t, Matrix, Matrix, Matrix, int64_t, Address, Matrix>;
  m.def("cpu_adapt", [](int code, int64_t rows, const Slots &slots, const std::vector<AdaptPart> &parts, int threads) {
    std::vector<fssa_adapt_part> list;
    list.reserve(parts.size());
    for (const auto &[rank, width, hidden, gamma, beta, stride, b, y] : parts) {
      list.push_back({rank, width, in(hidden), in(gamma), in(beta), stride, at(b), out(y)});
    }
    call(fssa_cpu_adapt, fssa_adapt_args{dtype(code), rows, slots_of(slots), list.data(),
                                         static_cast<int64_t>(list.size()), threads});
  });
  m.def("cpu_gate", [](int code, int activation, int64_t rows, int64_t width, const Matrix &gate, const Matrix &up,
                       const Matrix &y, int threads) {
    call(fssa_cpu_gate, fssa_gate_args{dtype(code), static_cast<fssa_activation>(activation), rows, width, in(gate),
                                       in(up), out(y), threads});
  });
  // sizes: tokens, heads, kv_heads, head_width. Tables of sines, of blocks and the cache: addresses and sizes.
  m.def("cpu_attention", [](int code, const std::array<int64_t, 4> &sizes, const Matrix &q, const Matrix &k,
                            const Matrix &v, Address q_norm, Address k_norm, float eps, Address cos, Address sin,
                            int64_t position_limit, Address positions, Address sequences, Address table,
                            int64_t sequence_limit, int64_t table_stride, Address keys, Address values,
                            int64_t block_limit, float scale, float softcap, int64_t window, const Matrix &to,
                            int threads) {
    call(fssa_cpu_attention,
         fssa_attention_args{dtype(code), sizes[0], sizes[1], sizes[2], sizes[3], in(q), in(k), in(v), at(q_norm),
                             at(k_norm), eps, at<const float>(cos), at<const float>(sin), position_limit,
                             at<const int32_t>(positions), at<const int32_t>(sequences), at<const int32_t>(table),
                             sequence_limit, table_stride, at<void>(keys), at<void>(values), block_limit, scale,
                             softcap, window, out(to), threads});
  });
}
