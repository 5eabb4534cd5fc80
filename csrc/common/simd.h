// One page of portable SIMD: a vector of float lanes whose width follows the instruction set this file is compiled for.
//
//   Vec           16 (AVX-512), 8 (AVX2) or 4 (SSE2, NEON) float lanes; + - * / and comparisons work on it, since it is
//                 a GCC/clang vector extension type
//   load, store   between Vec and float, bf16 or f16 memory of any alignment; all of a vector or its first n lanes
//   for_lanes     walks n elements in vectors, the incomplete last one included
//   fma, hsum, exp, sigmoid, silu
//
// float64 runs through the same kernels with `double` as a "vector" of one lane: right, if not fast.
// Everything is in an unnamed namespace inside the instruction set's own (see cpu.h for the reason).
#pragma once
#include <string.h>

#include "cpu.h"
#if PYLLM_X86
// GCC 12 takes the undefined register that some AVX-512 intrinsics pass on for a mistake (GCC bug 105593).
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#ifndef PYLLM_ISA
#error "compile with -DPYLLM_ISA=base, avx2 or avx512"
#endif

namespace pyllm {
namespace PYLLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kFloatLanes = 16;
#elif defined(__AVX2__)
constexpr int kFloatLanes = 8;
#else
constexpr int kFloatLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kFloatLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kFloatLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kFloatLanes)));   // the bits of a Vec
typedef uint16_t HalfVec __attribute__((vector_size(2 * kFloatLanes)));  // the bits of as many bf16 or f16

// What a storage type is computed in.
template <class T>
struct Compute {
  using Scalar = float;
  using V = Vec;
  static constexpr int kLanes = kFloatLanes;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using V = double;
  static constexpr int kLanes = 1;
};
template <class T>
using VecOf = typename Compute<T>::V;
template <class T>
using ScalarOf = typename Compute<T>::Scalar;

// How much of a vector a load or store touches. Lanes past a Part load as zero and are not stored.
struct Full {};
struct Part {
  int n;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// v in every lane of a V (a Vec or a double)
template <class V>
inline V splat(float v) { return V{} + v; }

// ---- memory -------------------------------------------------------------------------------------------------------

template <class V, class T>
inline V load_raw(const T* p, Full) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);  // compiles to one unaligned load
  return v;
}
template <class V, class T>
inline void store_raw(T* p, V v, Full) { __builtin_memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
template <class V>
inline V load_raw(const float* p, Part m) { return V(_mm512_maskz_loadu_ps(__mmask16((1u << m.n) - 1), p)); }
template <class V>
inline void store_raw(float* p, V v, Part m) { _mm512_mask_storeu_ps(p, __mmask16((1u << m.n) - 1), __m512(v)); }
template <class V>
inline V load_raw(const uint16_t* p, Part m) { return V(_mm256_maskz_loadu_epi16(__mmask16((1u << m.n) - 1), p)); }
template <class V>
inline void store_raw(uint16_t* p, V v, Part m) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << m.n) - 1), __m256i(v));
}
#else
template <class V, class T>
inline V load_raw(const T* p, Part m) {
  V v = {};
  for (int i = 0; i < m.n; i++) v[i] = p[i];
  return v;
}
template <class V, class T>
inline void store_raw(T* p, V v, Part m) {
  for (int i = 0; i < m.n; i++) p[i] = v[i];
}
#endif

// ---- bf16 and f16 -------------------------------------------------------------------------------------------------

inline BitVec to_bits(Vec v) { return bit_cast<BitVec>(v); }
inline Vec from_bits(BitVec b) { return bit_cast<Vec>(b); }

// 16 bits to 32 and back (the upper half must be zero). __builtin_convertvector says the same on every machine, but
// GCC 12 makes five instructions of it where x86 has one or two.
#if defined(__AVX512F__)
inline BitVec widen(HalfVec h) { return BitVec(_mm512_cvtepu16_epi32(__m256i(h))); }
inline HalfVec narrow(BitVec b) { return HalfVec(_mm512_cvtepi32_epi16(__m512i(b))); }
#elif defined(__AVX2__)
inline BitVec widen(HalfVec h) { return BitVec(_mm256_cvtepu16_epi32(__m128i(h))); }
inline HalfVec narrow(BitVec b) {
  return HalfVec(_mm_packus_epi32(_mm256_castsi256_si128(__m256i(b)), _mm256_extracti128_si256(__m256i(b), 1)));
}
#else
inline BitVec widen(HalfVec h) { return __builtin_convertvector(h, BitVec); }
inline HalfVec narrow(BitVec b) { return __builtin_convertvector(b, HalfVec); }
#endif

// bf16 is the upper half of a float.
inline Vec from_bf16(HalfVec h) { return from_bits(widen(h) << 16); }

// To nearest, ties to even: adding 0x7fff carries into the upper half when the lower half is above one half, and one
// more when the upper half is odd. The bf16 is the upper half of the result; the lower half is left as it comes.
// Only for a "tame" NaN, one whose lower half is zero: with others the carry could make infinity or -0 of it.
inline BitVec round_tame_bf16(Vec v) {
  const BitVec u = to_bits(v);
  return u + (0x7fffu + ((u >> 16) & 1u));
}
// For every v.
#if defined(__AVX512F__)
inline BitVec round_bf16(Vec v) {
  // One instruction makes every NaN the default one: that is response 3, here to input classes 0 (quiet NaN) and 1
  // (signalling NaN), 4 bits each. All other classes have response 0: unchanged.
  const __m512i responses = _mm512_set1_epi32(0x33);
  return round_tame_bf16(Vec(_mm512_fixupimm_ps(__m512(v), __m512(v), responses, 0)));
}
#else
inline BitVec round_bf16(Vec v) { return round_tame_bf16(v) | BitVec(v != v); }
#endif
inline HalfVec to_bf16(Vec v) { return narrow(round_bf16(v) >> 16); }

#if defined(__AVX512F__)
inline Vec from_f16(HalfVec h) { return Vec(_mm512_cvtph_ps(__m256i(h))); }
inline HalfVec to_f16(Vec v) { return HalfVec(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
inline Vec from_f16(HalfVec h) { return Vec(_mm256_cvtph_ps(__m128i(h))); }
inline HalfVec to_f16(Vec v) { return HalfVec(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__aarch64__)
inline Vec from_f16(HalfVec h) { return Vec(vcvt_f32_f16(bit_cast<float16x4_t>(h))); }
inline HalfVec to_f16(Vec v) { return bit_cast<HalfVec>(vcvt_f16_f32(float32x4_t(v))); }
#else
// Without hardware conversion, by bits. f16 has 5 exponent bits (bias 15) and 10 mantissa bits, float 8 (bias 127), 23.
inline Vec from_f16(HalfVec h) {
  const BitVec u = widen(h), sign = (u & 0x8000u) << 16, rest = (u & 0x7fffu) << 13;
  // Read as a float, `rest` has the exponent 112 too small; the multiplication corrects it and is right for subnormal
  // numbers, too. Infinity and NaN get the largest exponent.
  const BitVec finite = to_bits(from_bits(rest) * 0x1p112f);
  return from_bits(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}
inline HalfVec to_f16(Vec v) {
  const BitVec u = to_bits(v), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const BitVec normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;  // to nearest even, as for bf16
  // Below 2^-14 results are multiples of 2^-24: adding 0.5 makes the hardware round to just that.
  const BitVec subnormal = to_bits(from_bits(a) + 0.5f) - 0x3f000000u;
  BitVec r = a < 0x38800000u ? subnormal : normal;
  r = a >= 0x477ff000u ? BitVec{} + 0x7c00u : r;                       // 65520 and above round to infinity
  r = a > 0x7f800000u ? (0x7e00u | ((a >> 13) & 0x3ffu)) : r;          // NaN stays NaN
  return narrow(sign | r);
}
#endif

// load(p, m), store(p, v, m) for every storage type; m is Full{} or Part{n}.
template <class M>
inline Vec load(const float* p, M m) { return load_raw<Vec>(p, m); }
template <class M>
inline Vec load(const bf16* p, M m) { return from_bf16(load_raw<HalfVec>(&p->bits, m)); }
template <class M>
inline Vec load(const f16* p, M m) { return from_f16(load_raw<HalfVec>(&p->bits, m)); }
template <class M>
inline double load(const double* p, M) { return load_raw<double>(p, Full{}); }
template <class M>
inline void store(float* p, Vec v, M m) { store_raw(p, v, m); }
template <class M>
inline void store(bf16* p, Vec v, M m) { store_raw(&p->bits, to_bf16(v), m); }
template <class M>
inline void store(f16* p, Vec v, M m) { store_raw(&p->bits, to_f16(v), m); }
template <class M>
inline void store(double* p, double v, M) { store_raw(p, v, Full{}); }

// Two vectors' worth of neighbouring elements, in an order of their own that load_pair and store_pair agree on: enough
// for kernels that treat every element alike. For bf16 one vector gets the even elements and the other the odd ones: a
// shift and a mask, where load() has to spread 16 bits to 32 across the register. Rounding takes NaNs to be tame, which
// all are that come of arithmetic on bf16 inputs: it hands on an operand's NaN or makes the default one.
struct Pair {
  Vec even, odd;
};
template <class T>
inline Pair load_pair(const T* p) { return {load(p, Full{}), load(p + kFloatLanes, Full{})}; }
template <class T>
inline void store_pair(T* p, Pair v) {
  store(p, v.even, Full{});
  store(p + kFloatLanes, v.odd, Full{});
}
template <class S>
inline S tame(S v) { return v == v ? v : S(__builtin_nanf("")); }  // for float32 that meets them
// Whether a pair of T is divided into even and odd elements.
template <class T>
constexpr bool kEvenOdd = false;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
template <>
constexpr bool kEvenOdd<bf16> = true;
inline Pair from_bf16_pair(BitVec both) { return {from_bits(both << 16), from_bits(both & 0xffff0000u)}; }
inline BitVec to_bf16_pair(Pair v) {
  return (round_tame_bf16(v.even) >> 16) | (round_tame_bf16(v.odd) & 0xffff0000u);
}
inline Pair load_pair(const bf16* p) { return from_bf16_pair(load_raw<BitVec>(p, Full{})); }
inline void store_pair(bf16* p, Pair v) { store_raw(p, to_bf16_pair(v), Full{}); }
#endif

// The same as a third kind of m, next to Full and Part, with the arithmetic to go with it: for kernels whose text shall
// be one for vectors and pairs (for_pairs below).
struct Both {};
inline Pair load(const float* p, Both) { return load_pair(p); }
inline Pair load(const bf16* p, Both) { return load_pair(p); }
inline void store(float* p, Pair v, Both) { store_pair(p, v); }
inline void store(bf16* p, Pair v, Both) { store_pair(p, v); }
inline Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
inline Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
inline Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
inline Pair operator*(Pair a, float b) { return {a.even * b, a.odd * b}; }

// Stores past the cache, for float outputs larger than it: an ordinary store first reads the line that it overwrites.
// Each thread calls stream_fence() after its last one, for these stores overtake others.
template <bool kStream, class T, class V, class M>
inline void store_out(T* p, V v, M m) { store(p, v, m); }
#if PYLLM_X86
template <bool kStream>
inline void store_out(float* p, Vec v, Full m) {
  if constexpr (!kStream) return store(p, v, m);
#if defined(__AVX512F__)
  _mm512_stream_ps(p, __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, __m256(v));
#else
  _mm_stream_ps(p, __m128(v));
#endif
}
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream_fence() {}
#endif
// Whether that pays and can be done: all rows must be aligned to vectors. From 8 MiB of output it measured 10-50 %
// faster, also when the output is read right afterwards; below it slower. For bf16 it made no difference.
template <class T>
inline bool worth_streaming(const T* p, int64_t row_stride, int64_t elements) {
  constexpr int64_t kStreamBytes = 8 << 20;
  constexpr int64_t kVectorBytes = int64_t(sizeof(Vec));
  return PYLLM_X86 && sizeof(T) == 4 && elements * 4 >= kStreamBytes && intptr_t(p) % kVectorBytes == 0 &&
         row_stride * 4 % kVectorBytes == 0;
}

// v rounded as storing it as a T would
template <class T>
inline VecOf<T> rounded(VecOf<T> v) {
  if constexpr (sizeof(T) == 2) {
    T memory[kFloatLanes];
    store(memory, v, Full{});
    return load(memory, Full{});
  } else {
    return v;
  }
}

// store(p, v, m), and v as it was rounded
template <class T, class V, class M>
inline V store_rounded(T* p, V v, M m) {
  v = rounded<T>(v);
  store(p, v, m);
  return v;
}
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
inline Pair store_rounded(bf16* p, Pair v, Both) {
  const BitVec both = to_bf16_pair(v);
  store_raw(p, both, Full{});
  return from_bf16_pair(both);
}
#endif

// Calls f(i, m, index) so that the pieces [i, i + lanes) or [i, i + m.n) cover [0, n). `index` is a constant that runs
// through 0 .. kUnroll-1: kernels keep one accumulator per index, which makes the additions independent (the CPU need
// not wait for one to end before it starts the next) and the sum more accurate.
template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
  constexpr operator int() const { return kIndex; }
};
template <class T, int kUnroll, class F>
inline __attribute__((always_inline)) void for_lanes(int64_t n, const F& f) {
  constexpr int kLanes = Compute<T>::kLanes;
  static_assert(kUnroll == 1 || kUnroll == 2 || kUnroll == 4, "unroll by 1, 2 or 4");
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    f(i, Full{}, Index<0>{});
    if constexpr (kUnroll >= 2) f(i + kLanes, Full{}, Index<1>{});
    if constexpr (kUnroll >= 4) {
      f(i + 2 * kLanes, Full{}, Index<2>{});
      f(i + 3 * kLanes, Full{}, Index<3>{});
    }
  }
  if constexpr (kUnroll > 1)
    for (; i + kLanes <= n; i += kLanes) f(i, Full{}, Index<0>{});
  if (i < n) f(i, Part{int(n - i)}, Index<0>{});
}

// for_lanes in pairs, f(i, Both{}, index), as far as they go. Half as many of them in a row keep the same number of
// accumulators busy.
template <bool kPairs, class T, int kUnroll, class F>
inline __attribute__((always_inline)) void for_pairs(int64_t n, const F& f) {
  constexpr int64_t kPair = 2 * kFloatLanes;
  int64_t i = 0;
  if constexpr (kPairs) {
    if constexpr (kUnroll == 4)
      for (; i + 2 * kPair <= n; i += 2 * kPair) {
        f(i, Both{}, Index<0>{});
        f(i + kPair, Both{}, Index<1>{});
      }
    for (; i + kPair <= n; i += kPair) f(i, Both{}, Index<0>{});
  }
  for_lanes<T, kPairs ? 1 : kUnroll>(n - i, [&](int64_t j, auto m, auto index) { f(i + j, m, index); });
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// a * b + c, rounded once where the CPU can
#if defined(__AVX512F__)
inline Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
inline Vec min(Vec a, Vec b) { return Vec(_mm512_min_ps(__m512(a), __m512(b))); }
inline Vec max(Vec a, Vec b) { return Vec(_mm512_max_ps(__m512(a), __m512(b))); }
#elif defined(__AVX2__)
inline Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
inline Vec min(Vec a, Vec b) { return Vec(_mm256_min_ps(__m256(a), __m256(b))); }
inline Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(__m256(a), __m256(b))); }
#else
#if defined(__aarch64__)
inline Vec fma(Vec a, Vec b, Vec c) { return Vec(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
// as x86 defines them: the second operand when either is NaN
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
inline Vec fma(float a, Vec b, Vec c) { return fma(Vec{} + a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline Pair fma(Pair a, Pair b, Pair c) { return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)}; }

// sum of the lanes, halves onto halves
inline float hsum(Vec v) {
  typedef float Quad __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(__m512(v)), _mm512_extractf32x8_ps(__m512(v), 1));
  const Quad four = Quad(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
#elif defined(__AVX2__)
  const Quad four = Quad(_mm_add_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1)));
#else
  const Quad four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}
inline double hsum(double v) { return v; }

inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }

// e^x = 2^n e^r with whole n and |r| <= ln2 / 2: e^r is a polynomial, 2^n an exponent field.
struct ExpParts {
  Vec e_r;
  Vec shifted;  // its lowest bits are n + 127, the exponent field of 2^n
};
inline ExpParts exp_parts(Vec x) {
  constexpr float kShift = 12582912.f + 127.f;  // 1.5 * 2^23 + 127: in a sum with it no bit stands for less than 1
  const Vec shifted = fma(1.44269504f, x, splat<Vec>(kShift));
  const Vec n = shifted - kShift;
  Vec r = fma(-0.693359375f, n, x);  // ln2 in two parts: the first has few bits, so that its product with n is exact
  r = fma(2.12194440e-4f, n, r);
  // 1 + r + r^2 q(r), where q makes the largest relative error smallest (0.04 units in the last place; Taylor's series
  // of the same degree: 1).
  Vec p = splat<Vec>(1.3814433e-3f);
  p = fma(p, r, splat<Vec>(8.368797e-3f));
  p = fma(p, r, splat<Vec>(4.1668396e-2f));
  p = fma(p, r, splat<Vec>(1.666652e-1f));
  p = fma(p, r, splat<Vec>(4.9999994e-1f));
  p = fma(p, r, splat<Vec>(1.f));
  p = fma(p, r, splat<Vec>(1.f));
  return {p, shifted};
}
inline Vec clamp(Vec x, float low, float high) { return min(splat<Vec>(high), max(splat<Vec>(low), x)); }  // keeps NaN

// e^x with an error below 2 units in the last place for every float: overflow gives inf, underflow goes through the
// subnormal numbers to 0, NaN stays NaN.
inline Vec exp(Vec x) {
  const ExpParts e = exp_parts(clamp(x, -104.f, 89.f));  // where the result is 0 and inf
  // 2^n in two factors: n reaches from -150 to 128, one exponent field only from -126 to 127.
  const IntVec n = (bit_cast<IntVec>(e.shifted) & 1023) - 127 - ((bit_cast<IntVec>(e.shifted) & 512) << 1);
  const IntVec half = n >> 1;
  return e.e_r * bit_cast<Vec>((half + 127) << 23) * bit_cast<Vec>((n - half + 127) << 23);
}
inline double exp(double x) { return __builtin_exp(x); }

// 1 + e^-x, the denominator of sigmoid and silu. Here one exponent field is enough: 2^-127 reads as 0, right for a term
// next to 1, and 2^128 as inf, which comes out for x < -88.37 (a hair before e^-x overflows) and makes sigmoid 0.
inline Vec one_plus_exp_minus(Vec x) {
  const ExpParts e = exp_parts(clamp(-x, -88.f, 88.7f));
  return fma(e.e_r, bit_cast<Vec>(bit_cast<IntVec>(e.shifted) << 23), splat<Vec>(1.f));
}
inline double one_plus_exp_minus(double x) { return 1. + __builtin_exp(-x); }

template <class V>
inline V sigmoid(V x) { return 1.f / one_plus_exp_minus(x); }
template <class V>
inline V silu(V x) { return x / one_plus_exp_minus(x); }

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
