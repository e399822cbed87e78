// CUDA's execution model under a C++ compiler: stands in for csrc/cuda/instructions.h where FSSA_EMULATION is defined.
//
// Blocks run one after the other, in an order drawn from a seed. The threads of a block are fibers: one runs until it
// meets a barrier or an operation of its warp, then one drawn from those that can go on. What a chip leaves open is
// thus drawn, and a missing barrier shows. Shared memory is a fresh allocation of exactly the launch's size for every
// block, full of NaNs; asynchronous copies happen either when they are begun or when they are waited for.
//
// Global memory is the process's own, under AddressSanitizer. What is read and written there is counted.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
constexpr int MOST_SHARED = 163 * 1024;  // bytes a block may ask for, on the oldest chip that there are kernels for
extern Index thread_index, block_index, block_size;  // of the thread that runs

void barrier();
// Gives `words` words of every lane of the warp to every lane: the result's row l is lane l's. `kind` tells apart the
// operations that all lanes have to meet together.
const uint32_t (*exchange(const char *kind, const uint32_t *words, int count))[8];
unsigned char *shared();
void copy_async(void *to, const void *from, int bytes);
void copy_commit();
void copy_wait(int later);

// Seen and counted unless it lies in shared memory.
void count_read(const void *from, size_t bytes);
void count_write(const void *to, size_t bytes);
void count_products(int64_t multiply_adds);
[[noreturn]] void stop(const char *what);

void wait_for_launch_before();

// A thread of an early launch may not read what the launch before wrote until it has waited for it.
void run(const char *name, unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared_bytes, bool early,
         const std::function<void()> &kernel);

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)

inline void __syncthreads() { emulation::barrier(); }
inline void __threadfence() {}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  if (mask != 0xffffffffu) emulation::stop("a shuffle whose mask is not the whole warp");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const auto lanes = emulation::exchange("shuffle", &word, 1);
  std::memcpy(&value, &lanes[(emulation::thread_index.x % 32) ^ static_cast<unsigned>(distance)][0], 4);
  return value;
}

inline int atomicAdd(int *at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

namespace fssa {
namespace cuda {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(Float16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float result = exponent == 31  ? (fraction ? NAN : INFINITY)
                 : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                 : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return value.bits & 0x8000 ? -result : result;
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) { return value; }
template <>
inline Bfloat16 from_float<Bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 6.103515625e-05f) {  // subnormal: steps of 2^-24; what rounds up to 1024 of them is the first normal number
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))))};
  }
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)))};
}

inline unsigned char *shared_memory() { return emulation::shared(); }

struct alignas(16) Bits128 {
  uint32_t word[4];
};

inline void check_aligned(const void *at, const char *what) {
  if (reinterpret_cast<uintptr_t>(at) % 16) emulation::stop(what);
}
inline Bits128 load128(const void *from) {
  check_aligned(from, "a load of 16 bytes from an address that is no multiple of 16");
  emulation::count_read(from, 16);
  return *static_cast<const Bits128 *>(from);
}
inline void store128(void *to, const Bits128 &bits) {
  check_aligned(to, "a store of 16 bytes to an address that is no multiple of 16");
  emulation::count_write(to, 16);
  *static_cast<Bits128 *>(to) = bits;
}
template <class T>
T load(const T *from) {
  emulation::count_read(from, sizeof(T));
  return *from;
}
template <class T>
void store(T *to, T value) {
  emulation::count_write(to, sizeof(T));
  *to = value;
}
inline float load_from_others(const float *from) { return load(from); }

inline void copy_async(void *to, const void *from, int bytes) { emulation::copy_async(to, from, bytes); }
inline void copy_commit() { emulation::copy_commit(); }
template <int LATER>
void copy_wait() { emulation::copy_wait(LATER); }

inline uint16_t half_word(const void *row, int column) { return static_cast<const uint16_t *>(row)[column]; }

inline void load_matrices(uint32_t (&to)[4], const void *row, bool transposed) {
  check_aligned(row, "ldmatrix: a row whose address is no multiple of 16");
  uint32_t words[2];
  std::memcpy(words, &row, 8);
  const auto lanes = emulation::exchange(transposed ? "ldmatrix.trans" : "ldmatrix", words, 2);
  const int lane = emulation::thread_index.x % 32, g = lane / 4, t = lane % 4;
  for (int matrix = 0; matrix < 4; matrix++) {
    const auto row_at = [&](int r) {
      const void *at;
      std::memcpy(&at, lanes[8 * matrix + r], 8);
      return at;
    };
    const uint32_t low = transposed ? half_word(row_at(2 * t), g) : half_word(row_at(g), 2 * t);
    const uint32_t high = transposed ? half_word(row_at(2 * t + 1), g) : half_word(row_at(g), 2 * t + 1);
    to[matrix] = low | high << 16;
  }
}
inline void load_matrices(uint32_t (&to)[4], const void *row) { load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void *row) { load_matrices(to, row, true); }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto lanes = emulation::exchange("mma", words, 6);
  const int lane = emulation::thread_index.x % 32, g = lane / 4, t = lane % 4;
  const auto element = [&](int of, int word, int half) {
    return static_cast<double>(to_float(T{static_cast<uint16_t>(lanes[of][word] >> 16 * half)}));
  };
  for (int i = 0; i < 4; i++) {  // c's row is g, or g + 8 for the last two; its column 2t or 2t + 1
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const int owner = k % 8 / 2, upper = k / 8;
      sum += element(4 * g + owner, 2 * upper + i / 2, k % 2) * element(4 * (2 * t + i % 2) + owner, 4 + upper, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
  emulation::count_products(64);  // 16 x 8 x 16 products, a lane's share
}

inline int64_t most_shared_memory() { return emulation::MOST_SHARED; }
inline void let_next_launch_begin() {}
inline void wait_for_launch_before() { emulation::wait_for_launch_before(); }

template <class... Parameters>
void launch(const char *name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared, void *, bool early,
            Parameters... arguments) {
  emulation::run(name, grid.x, grid.y, grid.z, threads, shared, early, [&] { kernel(arguments...); });
}
inline void clear(void *memory, size_t bytes, void *) { std::memset(memory, 0, bytes); }

}  // namespace cuda
}  // namespace fssa
