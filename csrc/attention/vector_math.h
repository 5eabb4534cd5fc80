// What attention needs of vectors beyond simd.h: powers of two, tanh, maxima, the sums of several vectors at once.
#pragma once
#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

template <class S>
constexpr S kLog2E = S(1.4426950408889634);
template <class S>
constexpr S kLn2 = S(0.6931471805599453);

// x in every lane. (0 + x would have to be computed, since it makes +0 of -0.)
template <class V, class S>
inline V all(S x) { return x - V{}; }

// 2^x with a relative error below 0.7 float32 epsilons. Softmax works in units of log 2: that saves the two
// multiplications that e^x spends on splitting x. Results below 2^-126 are 0 (next to the row's maximum, which is 1,
// nobody sees them), those from 2^128 on infinity; NaN stays NaN.
inline Vec exp2(Vec x) {
  constexpr float kShift = 12582912.f + 127.f;  // 1.5 * 2^23 + 127: in a sum with it no bit stands for less than 1
  x = clamp(x, -127.f, 128.f);
  const Vec shifted = x + kShift;  // its lowest bits are n + 127 with n = round(x): the exponent field of 2^n
  const Vec r = x - (shifted - kShift);
  // 2^r = 1 + r q(r) for |r| <= 1/2, where q makes the largest relative error smallest (0.02 epsilons).
  Vec p = splat<Vec>(1.5353362e-4f);
  p = fma(p, r, splat<Vec>(1.3398874e-3f));
  p = fma(p, r, splat<Vec>(9.618437e-3f));
  p = fma(p, r, splat<Vec>(5.5503324e-2f));
  p = fma(p, r, splat<Vec>(2.4022648e-1f));
  p = fma(p, r, splat<Vec>(6.9314718e-1f));
  p = fma(p, r, splat<Vec>(1.f));
  return p * bit_cast<Vec>(bit_cast<IntVec>(shifted) << 23);
}
inline double exp2(double x) { return __builtin_exp2(x); }
inline float exp2(float x) { return exp2(splat<Vec>(x))[0]; }
inline float log2(float x) { return __builtin_log2f(x); }
inline double log2(double x) { return __builtin_log2(x); }

// tanh with a relative error below 2 epsilons: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) cancels, else that.
inline Vec tanh(Vec x) {
  const Vec size = from_bits(to_bits(x) & 0x7fffffffu), z = x * x;
  Vec p = splat<Vec>(-5.70498872745e-3f);
  p = fma(p, z, splat<Vec>(2.06390887954e-2f));
  p = fma(p, z, splat<Vec>(-5.37397155531e-2f));
  p = fma(p, z, splat<Vec>(1.33314422036e-1f));
  p = fma(p, z, splat<Vec>(-3.33332819422e-1f));
  const Vec near = fma(x * z, p, x);
  const Vec far = 1.f - 2.f / (exp2(size * (2.f * kLog2E<float>)) + 1.f);
  return size < 0.625f ? near : from_bits(to_bits(far) | (to_bits(x) & 0x80000000u));
}
inline double tanh(double x) { return __builtin_tanh(x); }

inline double max(double a, double b) { return a > b ? a : b; }

// the largest lane; not for NaN
inline float hmax(Vec v) {
  typedef float Quad __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(__m512(v)), _mm512_extractf32x8_ps(__m512(v), 1));
  const Quad four = Quad(_mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
#elif defined(__AVX2__)
  const Quad four = Quad(_mm_max_ps(_mm256_castps256_ps128(__m256(v)), _mm256_extractf128_ps(__m256(v), 1)));
#else
  const Quad four = v;
#endif
  const float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
  return a > b ? a : b;
}
inline double hmax(double v) { return v; }

// Lane i of the result is the sum of v[i]'s lanes: a transposition that adds as it goes, several times faster than as
// many hsum(). At every step a vector comes of two, each of which brings half of its lanes.
#if PYLLM_X86
#if defined(__AVX512F__)
#define PYLLM_OF_FOUR(name) _mm512_##name##_ps
typedef __m512 Native;
#elif defined(__AVX2__)
#define PYLLM_OF_FOUR(name) _mm256_##name##_ps
typedef __m256 Native;
#else
#define PYLLM_OF_FOUR(name) _mm_##name##_ps
typedef __m128 Native;
#endif
// of four vectors, within every 128 bits
inline Native sum_four(Native a, Native b, Native c, Native d) {
  const Native ab = PYLLM_OF_FOUR(unpacklo)(a, b) + PYLLM_OF_FOUR(unpackhi)(a, b);
  const Native cd = PYLLM_OF_FOUR(unpacklo)(c, d) + PYLLM_OF_FOUR(unpackhi)(c, d);
  return PYLLM_OF_FOUR(shuffle)(ab, cd, 0x44) + PYLLM_OF_FOUR(shuffle)(ab, cd, 0xee);
}
#undef PYLLM_OF_FOUR
inline Vec sum_each(const Vec (&v)[kFloatLanes]) {
  Native four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    Native two[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const Native a = Native(v[i + 8 * j]), b = Native(v[i + 8 * j + 4]);
      two[j] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
    four[i] = _mm512_shuffle_f32x4(two[0], two[1], 0x88) + _mm512_shuffle_f32x4(two[0], two[1], 0xdd);
#elif defined(__AVX2__)
    const Native a = Native(v[i]), b = Native(v[i + 4]);
    four[i] = _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
#else
    four[i] = Native(v[i]);
#endif
  }
  return Vec(sum_four(four[0], four[1], four[2], four[3]));
}
#else
inline Vec sum_each(const Vec (&v)[kFloatLanes]) {
  Vec sums = {};
  for (int i = 0; i < kFloatLanes; i++) sums[i] = hsum(v[i]);
  return sums;
}
#endif
inline double sum_each(const double (&v)[1]) { return v[0]; }

// v where at <= lane's number + start < end, `other` elsewhere
inline Vec inside(Vec v, int64_t start, int64_t at, int64_t end, float other) {
  IntVec lane;
  for (int i = 0; i < kFloatLanes; i++) lane[i] = i;
  const auto near = [](int64_t n) { return int32_t(n < -1024 ? -1024 : n > 1024 ? 1024 : n); };
  return (lane >= near(at - start)) & (lane < near(end - start)) ? v : splat<Vec>(other);
}
inline double inside(double v, int64_t start, int64_t at, int64_t end, double other) {
  return start >= at && start < end ? v : other;
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
