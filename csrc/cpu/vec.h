// Vectors of float32 for the instruction set this file is compiled for, with loads and stores of all three dtypes.
//
// Everything lives in the namespace of the instruction set (FSSA_ISA), so that no inline function compiled for a newer
// one is ever linked into code that runs on an older machine; for the same reason nothing here comes from std.
// Products are fused into sums only by fma() (the build says -ffp-contract=off): a tail is computed like the rest.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "fssa.h"

#define FSSA_INLINE_MEMBER inline __attribute__((always_inline))
#define FSSA_INLINE static inline __attribute__((always_inline))
#define FSSA_UNROLL _Pragma("GCC unroll 32")

namespace fssa {
namespace FSSA_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

using Vec = __m512;

FSSA_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
FSSA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// NaN where b is NaN.
FSSA_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

FSSA_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
FSSA_INLINE Vec widen(bfloat16, __m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FSSA_INLINE Vec widen(float16, __m256i x) { return _mm512_cvtph_ps(x); }
FSSA_INLINE __m256i narrow(bfloat16, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
FSSA_INLINE __m256i narrow(float16, Vec x) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FSSA_INLINE Vec load(const float *p) { return _mm512_loadu_ps(p); }
FSSA_INLINE Vec load(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
FSSA_INLINE void store(float *p, Vec x) { _mm512_storeu_ps(p, x); }
FSSA_INLINE void store(float *p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }

template <class T>
FSSA_INLINE Vec load(const T *p) {
  return widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
template <class T>
FSSA_INLINE Vec load(const T *p, int64_t n) {
  return widen(T{}, _mm256_maskz_loadu_epi16(first(n), p));
}
template <class T>
FSSA_INLINE void store(T *p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow(T{}, x));
}
template <class T>
FSSA_INLINE void store(T *p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(T{}, x));
}

// The sums of four vectors, each by the same tree.
FSSA_INLINE void store_sums(float *p, Vec a, Vec b, Vec c, Vec d, bool add) {
  const Vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const Vec low = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
  const Vec high = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  const Vec lanes = low + high;
  const __m256 halves = _mm512_castps512_ps256(lanes) + _mm512_extractf32x8_ps(lanes, 1);
  const __m128 sums = _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
  _mm_storeu_ps(p, add ? _mm_loadu_ps(p) + sums : sums);
}

#elif defined(__AVX2__)

using Vec = __m256;

FSSA_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
FSSA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FSSA_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

FSSA_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FSSA_INLINE Vec widen(bfloat16, __m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
FSSA_INLINE Vec widen(float16, __m128i x) { return _mm256_cvtph_ps(x); }
FSSA_INLINE __m128i narrow(bfloat16, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
FSSA_INLINE __m128i narrow(float16, Vec x) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FSSA_INLINE Vec load(const float *p) { return _mm256_loadu_ps(p); }
FSSA_INLINE Vec load(const float *p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
FSSA_INLINE void store(float *p, Vec x) { _mm256_storeu_ps(p, x); }
FSSA_INLINE void store(float *p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }

template <class T>
FSSA_INLINE Vec load(const T *p) {
  return widen(T{}, _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
template <class T>
FSSA_INLINE Vec load(const T *p, int64_t n) {
  T copy[8] = {};
  memcpy(copy, p, n * sizeof(T));
  return load(static_cast<const T *>(copy));
}
template <class T>
FSSA_INLINE void store(T *p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), narrow(T{}, x));
}
template <class T>
FSSA_INLINE void store(T *p, Vec x, int64_t n) {
  T copy[8];
  store(copy, x);
  memcpy(p, copy, n * sizeof(T));
}

FSSA_INLINE void store_sums(float *p, Vec a, Vec b, Vec c, Vec d, bool add) {
  const Vec ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const Vec cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const Vec low = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
  const Vec high = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  const Vec lanes = low + high;
  const __m128 sums = _mm256_castps256_ps128(lanes) + _mm256_extractf128_ps(lanes, 1);
  _mm_storeu_ps(p, add ? _mm_loadu_ps(p) + sums : sums);
}

#else  // any machine: four floats, which GCC and Clang turn into what the baseline has

typedef float Vec __attribute__((vector_size(16)));

FSSA_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
FSSA_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FSSA_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

FSSA_INLINE float widen(float x) { return x; }
FSSA_INLINE float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
FSSA_INLINE float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits = (magnitude << 13) + ((127 - 15) << 23);
  if (magnitude >= 0x7c00) bits += (255 - 31 - (127 - 15)) << 23;  // infinity, NaN
  float value;
  if (magnitude < 0x400) {
    value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal, zero
    memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
FSSA_INLINE void narrow(float x, float *y) { *y = x; }
FSSA_INLINE void narrow(float x, bfloat16 *y) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  y->bits = static_cast<uint16_t>(bits >> 16);
}
FSSA_INLINE void narrow(float x, float16 *y) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to more than 65504
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end
    float shifted;
    memcpy(&shifted, &magnitude, sizeof(shifted));
    shifted += 0.5f;
    memcpy(&result, &shifted, sizeof(result));
    result -= 0x3f000000;
  } else {
    result = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  y->bits = static_cast<uint16_t>(sign | result);
}

template <class T>
FSSA_INLINE Vec load(const T *p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
FSSA_INLINE Vec load(const float *p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
FSSA_INLINE Vec load(const T *p, int64_t n) {
  Vec x = {};
  for (int i = 0; i < n; i++) x[i] = widen(p[i]);
  return x;
}
template <class T>
FSSA_INLINE void store(T *p, Vec x) {
  for (int i = 0; i < 4; i++) narrow(x[i], p + i);
}
FSSA_INLINE void store(float *p, Vec x) { memcpy(p, &x, sizeof(x)); }
template <class T>
FSSA_INLINE void store(T *p, Vec x, int64_t n) {
  for (int i = 0; i < n; i++) narrow(x[i], p + i);
}

FSSA_INLINE void store_sums(float *p, Vec a, Vec b, Vec c, Vec d, bool add) {
  const Vec ab = Vec{a[0], b[0], a[1], b[1]} + Vec{a[2], b[2], a[3], b[3]};
  const Vec cd = Vec{c[0], d[0], c[1], d[1]} + Vec{c[2], d[2], c[3], d[3]};
  const Vec sums = Vec{ab[0], ab[1], cd[0], cd[1]} + Vec{ab[2], ab[3], cd[2], cd[3]};
  store(p, add ? load(p) + sums : sums);
}

#endif

constexpr int64_t WIDTH = sizeof(Vec) / sizeof(float);
typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));

FSSA_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
FSSA_INLINE int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }

FSSA_INLINE float sum(Vec x) {
  float sums[4];
  store_sums(sums, x, x, x, x, false);
  return sums[0];
}

FSSA_INLINE float largest(Vec x) {
  float values[WIDTH];
  store(values, x);
  float result = values[0];
  for (int i = 1; i < WIDTH; i++) result = values[i] > result ? values[i] : result;
  return result;
}

// e^x for x <= 0, within 2 units in the last place; below the normal numbers it stays at the smallest. NaN stays NaN.
FSSA_INLINE Vec exp_nonpositive(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
  x = max(splat(-87.0f), x);
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  // Unsigned, since a NaN among the scores lets x > 0 come here, and the exponent's sum then wraps.
  const Bits power = ((Bits)shifted << 23) + 0x3f800000u;
  return p * (Vec)power;
}

// A long sum, taken a block of terms at a time, so that its error does not grow with its length.
class LongSum {
 public:
  FSSA_INLINE_MEMBER void add(Vec x) {
    block_ = block_ + x;
    if (++count_ % 16 == 0) {
      total_ = total_ + block_;
      block_ = splat(0.0f);
    }
  }
  FSSA_INLINE_MEMBER Vec total() const { return total_ + block_; }

 private:
  Vec block_ = splat(0.0f), total_ = splat(0.0f);
  int64_t count_ = 0;
};

// Calls body(T{}) with the element type of that dtype.
template <class Body>
FSSA_INLINE void with_type(fssa_dtype dtype, Body &&body) {
  switch (dtype) {
    case FSSA_FLOAT32: return body(float{});
    case FSSA_BFLOAT16: return body(bfloat16{});
    case FSSA_FLOAT16: return body(float16{});
  }
}

template <class T>
FSSA_INLINE float load_one(const T *p) {
  return load(p, 1)[0];
}

// Loads n floats (0 < n <= WIDTH), all of a vector the cheap way.
template <class T>
FSSA_INLINE Vec load_up_to(const T *p, int64_t n) {
  return n >= WIDTH ? load(p) : load(p, n);
}
template <class T>
FSSA_INLINE void store_up_to(T *p, Vec x, int64_t n) {
  n >= WIDTH ? store(p, x) : store(p, x, n);
}

}  // namespace FSSA_ISA
}  // namespace fssa
