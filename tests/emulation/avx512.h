// The instructions of AVX-512 that csrc/cpu uses, as functions of vectors, so that the sets avx512 and avx512_bf16 run on a
// machine without them: included before a source (-include), it makes the names that the source calls mean these.
// bfloat16 products are summed as Intel describes VDPBF16PS: the odd element first, each sum rounded once, numbers too
// small to be normal taken and left as zero.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace model {

typedef float F16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint16_t U32 __attribute__((vector_size(64)));

#define FSSA_MODEL static inline __attribute__((always_inline))

template <class To, class From>
FSSA_MODEL To as(const From &x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
template <class To, class From>
FSSA_MODEL To read(const From *p) {
  To y;
  memcpy(&y, p, sizeof(y));
  return y;
}
// The first `n` elements of p, zeros behind them; nothing else is read.
template <class Element, class To>
FSSA_MODEL To read_masked(uint32_t mask, const void *p) {
  Element values[sizeof(To) / sizeof(Element)] = {};
  for (unsigned i = 0; i < sizeof(To) / sizeof(Element); i++) {
    if (mask >> i & 1) memcpy(values + i, static_cast<const Element *>(p) + i, sizeof(Element));
  }
  return read<To>(values);
}
template <class Element, class From>
FSSA_MODEL void write_masked(void *p, uint32_t mask, const From &x) {
  Element values[sizeof(From) / sizeof(Element)];
  memcpy(values, &x, sizeof(x));
  for (unsigned i = 0; i < sizeof(From) / sizeof(Element); i++) {
    if (mask >> i & 1) memcpy(static_cast<Element *>(p) + i, values + i, sizeof(Element));
  }
}

FSSA_MODEL __m512 set1_ps(float x) { return __m512{} + x; }
FSSA_MODEL __m512i set1_epi32(int32_t x) { return as<__m512i>(I16{} + x); }
FSSA_MODEL __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
FSSA_MODEL __m512 max_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
FSSA_MODEL __m512i add_epi32(__m512i a, __m512i b) { return as<__m512i>(as<I16>(a) + as<I16>(b)); }
FSSA_MODEL __m512i slli_epi32(__m512i a, int count) {
  typedef uint32_t Unsigned __attribute__((vector_size(64)));
  return as<__m512i>(as<Unsigned>(a) << count);
}
FSSA_MODEL __m512i srli_epi32(__m512i a, int count) {
  typedef uint32_t Unsigned __attribute__((vector_size(64)));
  return as<__m512i>(as<Unsigned>(a) >> count);
}
FSSA_MODEL __m512i cvtepu16_epi32(__m256i x) {
  const auto from = as<uint16_t __attribute__((vector_size(32)))>(x);
  I16 to;
  for (int i = 0; i < 16; i++) to[i] = from[i];
  return as<__m512i>(to);
}
FSSA_MODEL __m256i cvtepi32_epi16(__m512i x) {
  const I16 from = as<I16>(x);
  uint16_t __attribute__((vector_size(32))) to;
  for (int i = 0; i < 16; i++) to[i] = static_cast<uint16_t>(from[i]);
  return as<__m256i>(to);
}
struct Halves256 {
  __m256 low, high;
};
struct Halves128 {
  __m128i low, high;
};
FSSA_MODEL __m512 cvtph_ps(__m256i x) {
  const Halves128 h = as<Halves128>(x);
  return as<__m512>(Halves256{_mm256_cvtph_ps(h.low), _mm256_cvtph_ps(h.high)});
}
FSSA_MODEL __m256i cvtps_ph(__m512 x) {
  const Halves256 h = as<Halves256>(x);
  return as<__m256i>(Halves128{_mm256_cvtps_ph(h.low, 0), _mm256_cvtps_ph(h.high, 0)});
}
FSSA_MODEL __mmask16 unordered(__m512 a, __m512 b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= (a[i] != a[i] || b[i] != b[i] ? 1u : 0u) << i;
  return static_cast<__mmask16>(mask);
}
FSSA_MODEL __m512i mask_mov_epi32(__m512i a, __mmask16 mask, __m512i b) {
  I16 x = as<I16>(a), y = as<I16>(b);
  for (int i = 0; i < 16; i++) x[i] = mask >> i & 1 ? y[i] : x[i];
  return as<__m512i>(x);
}
// In each quarter of four elements: two of a, two of b, each by its place.
FSSA_MODEL __m512 shuffle_ps(__m512 a, __m512 b, unsigned places) {
  __m512 y;
  for (unsigned i = 0; i < 16; i++) {
    const unsigned from = i / 4 * 4 + (places >> (i % 4 * 2) & 3);
    y[i] = i % 4 < 2 ? a[from] : b[from];
  }
  return y;
}
FSSA_MODEL __m512 unpack(__m512 a, __m512 b, unsigned from) {
  __m512 y;
  for (unsigned i = 0; i < 16; i++) {
    const unsigned place = i / 4 * 4 + from + i % 4 / 2;
    y[i] = i % 2 ? b[place] : a[place];
  }
  return y;
}
FSSA_MODEL __m512i permutex2var_epi16(__m512i a, __m512i from, __m512i b) {
  const U32 x = as<U32>(a), y = as<U32>(b), places = as<U32>(from);
  U32 to;
  for (int i = 0; i < 32; i++) to[i] = places[i] & 32 ? y[places[i] & 31] : x[places[i] & 31];
  return as<__m512i>(to);
}
FSSA_MODEL float normal_or_zero(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
FSSA_MODEL __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const I16 x = as<I16>(a), y = as<I16>(b);
  for (int i = 0; i < 16; i++) {
    const uint32_t left = static_cast<uint32_t>(x[i]), right = static_cast<uint32_t>(y[i]);
    float sum = normal_or_zero(sums[i]);
    for (int odd = 1; odd >= 0; odd--) {
      const float p = as<float>(odd ? left & 0xffff0000u : left << 16), q = as<float>(odd ? right & 0xffff0000u : right << 16);
      sum = normal_or_zero(__builtin_fmaf(normal_or_zero(p), normal_or_zero(q), sum));
    }
    sums[i] = sum;
  }
  return sums;
}

}  // namespace model

#define __AVX512F__ 1
#define __AVX512BF16__ 1
#define _mm512_set1_ps model::set1_ps
#define _mm512_set1_epi32 model::set1_epi32
#define _mm512_setzero_si512() __m512i{}
#define _mm512_fmadd_ps model::fmadd_ps
#define _mm512_max_ps model::max_ps
#define _mm512_add_epi32 model::add_epi32
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_slli_epi32 model::slli_epi32
#define _mm512_srli_epi32 model::srli_epi32
#define _mm512_castps_si512 model::as<__m512i>
#define _mm512_castsi512_ps model::as<__m512>
#define _mm512_castps512_ps256(x) model::as<model::Halves256>(x).low
#define _mm512_extractf32x8_ps(x, half) model::as<model::Halves256>(x).high
#define _mm512_cvtepu16_epi32 model::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 model::cvtepi32_epi16
#define _mm512_cvtph_ps model::cvtph_ps
#define _mm512_cvtps_ph(x, rounding) model::cvtps_ph(x)
#define _mm512_cmp_ps_mask(a, b, relation) model::unordered(a, b)
#define _mm512_mask_mov_epi32 model::mask_mov_epi32
#define _mm512_shuffle_ps model::shuffle_ps
#define _mm512_unpacklo_ps(a, b) model::unpack(a, b, 0)
#define _mm512_unpackhi_ps(a, b) model::unpack(a, b, 2)
#define _mm512_permutex2var_epi16 model::permutex2var_epi16
#define _mm512_dpbf16_ps model::dpbf16_ps
#define _mm512_load_si512(p) model::read<__m512i>(p)
#define _mm512_loadu_si512(p) model::read<__m512i>(p)
#define _mm512_loadu_ps(p) model::read<__m512>(p)
#define _mm512_storeu_ps(p, x) memcpy(p, &(x), 64)
#define _mm512_storeu_si512(p, x) model::write_masked<int32_t>(p, 0xffffu, x)
#define _mm512_maskz_loadu_ps(mask, p) model::read_masked<float, __m512>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) model::write_masked<float>(p, mask, x)
#define _mm512_maskz_loadu_epi16(mask, p) model::read_masked<uint16_t, __m512i>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) model::read_masked<uint16_t, __m256i>(mask, p)
#define _mm256_mask_storeu_epi16(p, mask, x) model::write_masked<uint16_t>(p, mask, x)
