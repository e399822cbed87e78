/* The CUDA half of the C interface; see ../fssa.h for the conventions and the arguments. Pointers are to the memory of the
 * current device, but for a struct's own `parts`. Work is put on `stream` (a cudaStream_t) and nothing waits for it; nothing
 * is allocated: what an op needs between its launches lies in `workspace`, as large as fssa_cuda_..._workspace says and
 * aligned to 256 bytes, whose contents do not matter before and after. Calls can be captured in a graph. `threads` is not
 * used. The values of slots, choices and offsets are not checked, since reading them would wait for the device. */
#ifndef FSSA_CUDA_INTERFACE_H
#define FSSA_CUDA_INTERFACE_H

#include "../fssa.h"

#ifdef __cplusplus
extern "C" {
#endif

FSSA_API fssa_status fssa_cuda_film(const fssa_film_args *args, void *stream);
FSSA_API fssa_status fssa_cuda_film_norm(const fssa_film_norm_args *args, void *stream);

FSSA_API int64_t fssa_cuda_lora_workspace(const fssa_lora_args *args);
FSSA_API fssa_status fssa_cuda_lora(const fssa_lora_args *args, void *workspace, void *stream);

FSSA_API int64_t fssa_cuda_context_workspace(const fssa_context_input *input);
FSSA_API fssa_status fssa_cuda_context(const fssa_context_args *args, void *workspace, void *stream);
FSSA_API fssa_status fssa_cuda_context_rows(const fssa_context_rows_args *args, void *workspace, void *stream);

#ifdef __cplusplus
}
#endif

#endif
