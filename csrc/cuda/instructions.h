// What the kernels ask of the chip beyond C++, by name: the instructions that CUDA has no function for, and the launch.
// Compiled by nvcc. Where FSSA_EMULATION is defined, another header of these names stands in (tests/emulation).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../status.h"

namespace fssa {
namespace cuda {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(value); }

// float32 rounded to T, to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ Bfloat16 from_float<Bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) { return __float2half_rn(value); }

// The block's shared memory, as much as its launch asked for.
__device__ __forceinline__ unsigned char *shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

struct alignas(16) Bits128 {
  uint32_t word[4];
};

// 16 bytes at an address that is a multiple of 16.
__device__ __forceinline__ Bits128 load128(const void *from) {
  const uint4 v = *static_cast<const uint4 *>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store128(void *to, const Bits128 &bits) {
  *static_cast<uint4 *>(to) = make_uint4(bits.word[0], bits.word[1], bits.word[2], bits.word[3]);
}

// One element of global memory.
template <class T>
__device__ __forceinline__ T load(const T *from) { return *from; }
template <class T>
__device__ __forceinline__ void store(T *to, T value) { *to = value; }
// One that another block wrote.
__device__ __forceinline__ float load_from_others(const float *from) { return __ldcg(from); }

// Begins to copy `bytes` (0 to 16) of global to shared memory and fills up 16 with zeros; addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void *to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most LATER of this thread's groups are under way.
template <int LATER>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(LATER) : "memory"); }

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l points at row l % 8 of matrix l / 8, and of each
// matrix gets the neighbours 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
// The same of the transposed matrices: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c += a b, a 16 x 16, b 16 x 8, float32 sums. Lane l, g = l / 4, t = l % 4, pairs of neighbours in a register:
// a (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8); b (2t, g) (2t + 8, g), neighbours down; c (g, 2t) and (g + 8, 2t).
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The next launch may begin from here on (its blocks wait in wait_for_launch_before).
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
// Waits until the launch before has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_launch_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

inline void check(cudaError_t error, const char *doing) {
  if (error != cudaSuccess) fail(FSSA_UNSUPPORTED, "%s: %s", doing, cudaGetErrorString(error));
}

// Bytes of shared memory that a block may ask for.
inline int64_t most_shared_memory() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "shared memory");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

// Puts a kernel on the stream. An early one may begin before the launch before it has ended, where the chip can.
template <class... Parameters>
void launch(const char *name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, void *stream,
            bool early, Parameters... arguments) {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name);
  if (major < 8) fail(FSSA_UNSUPPORTED, "%s: expected a GPU of compute capability 8.0 or newer, got %d.x", name, major);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early && major >= 9 ? 1 : 0;
  if (shared > 48 * 1024) {  // what a kernel has without asking
    const auto attribute_of_kernel = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, attribute_of_kernel, static_cast<int>(shared)), name);
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// Zeros, on the stream.
inline void clear(void *memory, size_t bytes, void *stream) {
  check(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "clearing the workspace");
}

}  // namespace cuda
}  // namespace fssa
