// float16 as the machine has it, rounded to nearest even.
#pragma once
#include "cuda_runtime.h"

struct __half { uint16_t x; };
struct alignas(4) __half2 { __half x, y; };

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half h) {
  const unsigned sign = unsigned(h.x & 0x8000) << 16, exponent = h.x >> 10 & 31, mantissa = h.x & 1023;
  if (exponent == 0) {
    const float value = std::ldexp(float(mantissa), -24);
    return sign ? -value : value;
  }
  return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13);
}
inline __half __float2half_rn(float f) {
  const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7fff)};   // NaN
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past 65504: infinity
  if (magnitude < 0x38800000)                                     // subnormal
    return {uint16_t(sign | unsigned(std::nearbyint(std::ldexp(__uint_as_float(magnitude), 24))))};
  unsigned rebased = magnitude - 0x38000000;
  rebased += 0xfff + (rebased >> 13 & 1);
  return {uint16_t(sign | rebased >> 13)};
}
inline __half2 __floats2half2_rn(float lo, float hi) { return {__float2half_rn(lo), __float2half_rn(hi)}; }
