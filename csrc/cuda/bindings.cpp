// The CUDA ops as the Python module fssa_fast._cuda: one function an op, pointers as integers, tuples as in ../bindings.h.
// `workspace` is asked for memory: called with a number of bytes it gives an address.
#include "../bindings.h"
#include "interface.h"

using namespace fssa::bindings;

namespace {

void *memory(const py::function &workspace, int64_t bytes) { return at<void>(workspace(bytes).cast<Address>()); }

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA ops of fssa_fast (csrc/cuda/interface.h), by addresses; fssa_fast.backends.cuda gives it tensors.";

  m.def("film", [](int code, int64_t rows, int64_t width, const Matrix &x, const Film &film, const Slots &slots,
                   const Matrix &y, Address stream) {
    const fssa_film_args args{dtype(code), rows, width, in(x), film_of(film), slots_of(slots), out(y), 1};
    raise(fssa_cuda_film(&args, at<void>(stream)));
  });
  m.def("film_norm", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &residual,
                        const Film &film, const Slots &slots, const Norm &norm, const Matrix &hidden,
                        const Matrix &normed, Address stream) {
    const fssa_film_norm_args args{dtype(code),     rows,          width,       in(x),       in(residual), film_of(film),
                                   slots_of(slots), norm_of(norm), out(hidden), out(normed), 1};
    raise(fssa_cuda_film_norm(&args, at<void>(stream)));
  });
  m.def("lora", [](int code, int64_t rows, int64_t width, const Matrix &x, const Matrix &a,
                   const Modulation &modulation, const Slots &slots, float scaling, const std::vector<Part> &parts,
                   const py::function &workspace, Address stream) {
    const auto list = parts_of<fssa_lora_part>(parts);
    const fssa_lora_args args{dtype(code),     rows,    width,       in(x), in(a), modulation_of(modulation),
                              slots_of(slots), scaling, list.data(), static_cast<int64_t>(list.size()), 1};
    raise(fssa_cuda_lora(&args, memory(workspace, fssa_cuda_lora_workspace(&args)), at<void>(stream)));
  });
  m.def("context", [](const ContextInput &input, Address encoded, const py::function &workspace, Address stream) {
    const fssa_context_args args{context_input(input, 1), at<void>(encoded)};
    raise(fssa_cuda_context(&args, memory(workspace, fssa_cuda_context_workspace(&args.input)), at<void>(stream)));
  });
  m.def("context_rows", [](const ContextInput &input, const Bank &bank, const Latents &latents,
                           const py::function &workspace, Address stream) {
    const fssa_context_rows_args args = context_rows_args(input, bank, latents, 1);
    raise(fssa_cuda_context_rows(&args, memory(workspace, fssa_cuda_context_workspace(&args.input)), at<void>(stream)));
  });
}
