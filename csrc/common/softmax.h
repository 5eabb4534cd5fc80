// What a softmax needs beyond simd.h: maximum over lanes, exp for arguments that are not positive, tanh for softcaps, and
// the same for whole pairs of vectors and for single numbers.
#pragma once
#include "simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// f of a vector, of both vectors of a pair, of a double
template <class F>
inline Vec each(Vec v, const F& f) { return f(v); }
template <class F>
inline Pair each(Pair v, const F& f) { return {f(v.even), f(v.odd)}; }
template <class F>
inline double each(double v, const F& f) { return f(v); }

// v where m reaches, `fill` in the lanes past it
inline Vec keep(Vec v, Full, float) { return v; }
inline Pair keep(Pair v, Both, float) { return v; }
inline Vec keep(Vec v, Part m, float fill) {
  IntVec lane = {};
  for (int i = 0; i < kFloatLanes; i++) lane[i] = i;
  return lane < m.n ? v : splat<Vec>(fill);
}
template <class M>
inline double keep(double v, M, float) { return v; }

inline double max(double a, double b) { return a > b ? a : b; }

inline float hmax(Vec v) {
  float top = v[0];
  for (int i = 1; i < kFloatLanes; i++) top = v[i] > top || v[i] != v[i] ? v[i] : top;
  return top;
}
inline double hmax(double v) { return v; }

// e^x for x <= 0 (a little above is fine) with an error below 2 units in the last place. Below -87.3 it is 0: next to
// the largest term of a softmax, which is 1, nobody can tell. One exponent field is enough then: cheaper than exp().
inline Vec exp_below(Vec x) {
  const ExpParts e = exp_parts(max(splat<Vec>(-88.f), x));  // in this order NaN stays NaN
  return e.e_r * bit_cast<Vec>(bit_cast<IntVec>(e.shifted) << 23);  // 2^-127 reads as 0
}
inline double exp_below(double x) { return __builtin_exp(x); }

// To 2 units in the last place. Far from 0 by e = e^-2|x|, as 1 less a small number, which rounds once where (1 - e) /
// (1 + e) would three times; near it, where that cancels, by a polynomial whose largest relative error is least.
inline Vec tanh(Vec x) {
  const Vec square = x * x, size = from_bits(to_bits(x) & 0x7fffffffu);
  Vec p = splat<Vec>(-5.70498872745e-3f);
  p = fma(p, square, splat<Vec>(2.06390887954e-2f));
  p = fma(p, square, splat<Vec>(-5.37397155531e-2f));
  p = fma(p, square, splat<Vec>(1.33314422036e-1f));
  p = fma(p, square, splat<Vec>(-3.33332819422e-1f));
  const Vec near = fma(p * square, x, x);
  const Vec e = exp_below(-2.f * size), far = 1.f - 2.f * e / (1.f + e);
  const Vec signed_far = from_bits(to_bits(far) | (to_bits(x) & 0x80000000u));
  return size < 0.625f ? near : signed_far;
}
inline double tanh(double x) { return __builtin_tanh(x); }

inline float log(float x) { return __builtin_logf(x); }
inline double log(double x) { return __builtin_log(x); }

// One element: as vectors compute it.
template <class T>
inline ScalarOf<T> value(const T* p) {
  if constexpr (sizeof(T) == 8)
    return *p;
  else
    return load(p, Part{1})[0];
}
inline float lane(Vec v) { return v[0]; }
inline double lane(double v) { return v; }

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
