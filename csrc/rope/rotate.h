// What the three rotary kernels share: a token's angles in the order in which its heads want them, and one head turned.
// Include it in kernel files only: it is compiled once per instruction set.
#pragma once
#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// A vector with the two of each pair of lanes exchanged.
inline Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return Vec(_mm512_permute_ps(__m512(v), 0xb1));
#elif defined(__AVX2__)
  return Vec(_mm256_permute_ps(__m256(v), 0xb1));
#elif defined(__aarch64__)
  return Vec(vrev64q_f32(float32x4_t(v)));
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

// Half-split heads of bf16 are read in pairs (simd.h), which makes it matter in what order float32 lies beside them.
template <class T>
constexpr bool kTurnsInPairs = kEvenOdd<T>;

// Copies n numbers, from[i * step] times factor, in the order in which for_pairs<kPairs> comes by them; no NaN among
// them is one that bf16 pairs can't be rounded from.
template <bool kPairs, class S, class Step>
inline __attribute__((always_inline)) void in_order_by(const S* from, Step step, S factor, int64_t n, S* to) {
  int64_t i = 0;
  if constexpr (kPairs)
    for (; i + 2 * kFloatLanes <= n; i += 2 * kFloatLanes)
      for (int j = 0; j < kFloatLanes; j++) {
        to[i + j] = tame(from[(i + 2 * j) * step] * factor);
        to[i + kFloatLanes + j] = tame(from[(i + 2 * j + 1) * step] * factor);
      }
  for (; i < n; i++) to[i] = tame(from[i * step] * factor);
}
template <bool kPairs, class S>
inline void in_order(const S* __restrict from, int64_t step, S factor, int64_t n, S* __restrict to) {
  if (step == 1)
    in_order_by<kPairs>(from, Index<1>{}, factor, n, to);  // known to the compiler, which makes vectors of it
  else
    in_order_by<kPairs>(from, step, factor, n, to);
}

// Where a token's angles are, R/2 of them, `step` apart.
template <class S>
struct Angles {
  const S* cos;
  const S* sin;
};

// Writes R values of cos and R of sin. Half-split: in the order of in_order(), the second half unused. Interleaved:
// every value twice, sin with signs (-, +), so that y = x * cos + swapped x * sin.
template <class T>
inline void prepare_angles(Angles<ScalarOf<T>> from, int64_t step, int64_t R, bool interleaved, ScalarOf<T> turn,
                           ScalarOf<T>* cos, ScalarOf<T>* sin) {
  using S = ScalarOf<T>;
  if (!interleaved) {
    in_order<kTurnsInPairs<T>>(from.cos, step, S(1), R / 2, cos);
    in_order<kTurnsInPairs<T>>(from.sin, step, turn, R / 2, sin);
    return;
  }
  for (int64_t i = 0; i < R / 2; i++) {
    const S c = tame(from.cos[i * step]), s = tame(from.sin[i * step] * turn);
    cos[2 * i] = cos[2 * i + 1] = c;
    sin[2 * i] = -s;
    sin[2 * i + 1] = s;
  }
}

// One head, turned: value(i, m) gives its elements [i, i + lanes), out(i, v, m) takes them, for all i < R.
template <class T, class Value, class Out>
inline __attribute__((always_inline)) void turn_head(int64_t R, bool interleaved, const ScalarOf<T>* cos,
                                                     const ScalarOf<T>* sin, const Value& value, const Out& out) {
  if (!interleaved) {
    const int64_t half = R / 2;
    for_pairs<kTurnsInPairs<T>, T, 1>(half, [&](int64_t i, auto m, auto) {
      const auto c = load(cos + i, m), s = load(sin + i, m), a = value(i, m), b = value(half + i, m);
      out(i, a * c - b * s, m);
      out(half + i, b * c + a * s, m);
    });
  } else if constexpr (Compute<T>::kLanes == 1) {
    for (int64_t i = 0; i < R; i += 2) {
      const auto a = value(i, Full{}), b = value(i + 1, Full{});
      out(i, a * cos[i] + b * sin[i], Full{});
      out(i + 1, b * cos[i + 1] + a * sin[i + 1], Full{});
    }
  } else {
    for_lanes<T, 1>(R, [&](int64_t i, auto m, auto) {
      const auto v = value(i, m);
      out(i, fma(v, load(cos + i, m), swap_pairs(v) * load(sin + i, m)), m);
    });
  }
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
