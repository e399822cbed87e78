// The C interface as a Python module: one function an op, pointers as integers.
#include "bindings.h"

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

  m.def("cpu_film", [](int code, int64_t rows, int64_t width, const Matrix &x, const Film &film, const Slots &slots,
                       const Matrix &y, int threads) {
    call(fssa_cpu_film, fssa_film_args{dtype(code), rows, width, in(x), film_of(film), slots_of(slots), out(y), threads});
  });
  m.def("cpu_film_norm", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &residual,
                            const Film &film, const Slots &slots, const Norm &norm, const Matrix &hidden,
                            const Matrix &normed, int threads) {
    call(fssa_cpu_film_norm, fssa_film_norm_args{dtype(code), rows, width, in(x), in(residual), film_of(film),
                                                 slots_of(slots), norm_of(norm), out(hidden), out(normed), threads});
  });
  m.def("cpu_film_backward", [](int code, int64_t rows, int64_t width, const Matrix &grad, const Matrix &x,
                                const Matrix &scale, const Slots &slots, const Matrix &dx, const Matrix &dscale,
                                const Matrix &dshift, int threads) {
    call(fssa_cpu_film_backward,
         fssa_film_backward_args{dtype(code), rows, width, in(grad), in(x), in(scale), slots_of(slots), out(dx),
                                 out(dscale), out(dshift), threads});
  });
  // gradients: dx, dscale, dshift, dweight.
  using FilmNormGradients = std::tuple<Matrix, Matrix, Matrix, Address>;
  m.def("cpu_film_norm_backward", [](int code, int64_t rows, int64_t width, const Matrix &grad_hidden,
                                     const Matrix &grad_normed, const Matrix &x, const Matrix &residual,
                                     const Film &film, const Slots &slots, const Norm &norm,
                                     const FilmNormGradients &gradients, int threads) {
    const auto &[dx, dscale, dshift, dweight] = gradients;
    call(fssa_cpu_film_norm_backward,
         fssa_film_norm_backward_args{dtype(code), rows, width, in(grad_hidden), in(grad_normed), in(x), in(residual),
                                      film_of(film), slots_of(slots), norm_of(norm),
                                      {out(dx), out(dscale), out(dshift), at<void>(dweight)}, threads});
  });
  m.def("cpu_lora", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &a,
                       const Modulation &modulation, const Slots &slots, float scaling, const std::vector<Part> &parts,
                       int threads) {
    const auto list = parts_of<fssa_lora_part>(parts);
    call(fssa_cpu_lora, fssa_lora_args{dtype(code), rows, width, in(x), in(a), modulation_of(modulation), slots_of(slots),
                                       scaling, list.data(), static_cast<int64_t>(list.size()), threads});
  });
  // gradients: dx, da, dgamma, dbeta.
  using LoraGradients = std::tuple<Matrix, Matrix, Matrix, Matrix>;
  m.def("cpu_lora_backward", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &a,
                                const Modulation &modulation, const Slots &slots, float scaling,
                                const std::vector<Part> &parts, const LoraGradients &gradients, int threads) {
    const auto list = parts_of<fssa_lora_backward_part>(parts);
    const auto &[dx, da, dgamma, dbeta] = gradients;
    call(fssa_cpu_lora_backward,
         fssa_lora_backward_args{dtype(code), rows, width, in(x), in(a), modulation_of(modulation), slots_of(slots),
                                 scaling, list.data(), static_cast<int64_t>(list.size()),
                                 {out(dx), out(da), out(dgamma), out(dbeta)}, threads});
  });
  m.def("cpu_context", [](const ContextInput &input, Address encoded, int threads) {
    call(fssa_cpu_context, fssa_context_args{context_input(input, threads), at<void>(encoded)});
  });
  m.def("cpu_context_rows", [](const ContextInput &input, const Bank &bank, const Latents &latents, int threads) {
    call(fssa_cpu_context_rows, context_rows_args(input, bank, latents, threads));
  });
  m.def("cpu_context_backward", [](const ContextInput &input, Address grad, Address dpairs,
                                   const std::vector<Address> &g, int threads) {
    if (g.size() != 12) throw py::value_error("gradients: expected 12 addresses");
    call(fssa_cpu_context_backward,
         fssa_context_backward_args{
             context_input(input, threads), at(grad), at<void>(dpairs),
             {at<void>(g[0]), at<void>(g[1]), at<void>(g[2]), at<void>(g[3]), at<void>(g[4]), at<void>(g[5]),
              at<void>(g[6]), at<void>(g[7]), at<void>(g[8]), at<void>(g[9]), at<void>(g[10]), at<void>(g[11])}});
  });

  m.def("cpu_linear", [](int code, int64_t rows, int64_t width, int64_t outputs, const Matrix &x, Address weight,
                         Address bias, const Matrix &y, int threads) {
    call(fssa_cpu_linear,
         fssa_linear_args{dtype(code), rows, width, outputs, in(x), at(weight), at(bias), out(y), threads});
  });
  // A part: rank, width, hidden, modulation, b, y.
  using AdaptPart = std::tuple<int64_t, int64_t, Matrix, Modulation, Address, Matrix>;
  m.def("cpu_adapt", [](int code, int64_t rows, const Slots &slots, const std::vector<AdaptPart> &parts, int threads) {
    std::vector<fssa_adapt_part> list;
    list.reserve(parts.size());
    for (const auto &[rank, width, hidden, modulation, b, y] : parts) {
      list.push_back({rank, width, in(hidden), modulation_of(modulation), at(b), out(y)});
    }
    call(fssa_cpu_adapt, fssa_adapt_args{dtype(code), rows, slots_of(slots), list.data(),
                                         static_cast<int64_t>(list.size()), threads});
  });
  m.def("cpu_gate", [](int code, int activation, int64_t rows, int64_t width, const Matrix &gate, const Matrix &up,
                       const Matrix &y, int threads) {
    call(fssa_cpu_gate, fssa_gate_args{dtype(code), static_cast<fssa_activation>(activation), rows, width, in(gate),
                                       in(up), out(y), threads});
  });
  // Groups as in fssa.h, their members in its order: heads, tokens, rotary, cache, scores.
  using Heads = std::tuple<int64_t, int64_t, int64_t>;
  using Tokens = std::tuple<int64_t, Matrix, Matrix, Matrix, Address, Address>;
  using Rotary = std::tuple<Address, Address, float, Address, Address, int64_t>;
  using Cache = std::tuple<Address, Address, int64_t, Address, int64_t, int64_t>;
  using Scores = std::tuple<float, float, int64_t>;
  m.def("cpu_attention", [](int code, const Heads &of, const Tokens &tokens, const Rotary &rotary, const Cache &cache,
                            const Scores &scores, const Matrix &to, int threads) {
    const auto &[heads, kv_heads, head_width] = of;
    const auto &[count, q, k, v, positions, sequences] = tokens;
    const auto &[q_norm, k_norm, eps, cos, sin, position_limit] = rotary;
    const auto &[keys, values, blocks, table, sequence_limit, table_stride] = cache;
    const auto &[scale, softcap, window] = scores;
    call(fssa_cpu_attention,
         fssa_attention_args{
             dtype(code),
             {heads, kv_heads, head_width},
             {count, in(q), in(k), in(v), at<const int32_t>(positions), at<const int32_t>(sequences)},
             {at(q_norm), at(k_norm), eps, at<const float>(cos), at<const float>(sin), position_limit},
             {at<void>(keys), at<void>(values), blocks, at<const int32_t>(table), sequence_limit, table_stride},
             {scale, softcap, window},
             out(to),
             threads});
  });
}
