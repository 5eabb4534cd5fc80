// Scores to probabilities, a tile of keys at a time. Everything is in base 2: exp(x) = 2^(x log2 e) saves a product. The
// usual scores stay q . k as they are, and the exponential's argument is one fused multiplication and subtraction.
#pragma once
#include "common/mma.cuh"

namespace pyllm {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Products q . k to exponents of 2: `of` them, times `unit`.
struct Score {
  float scale, cap, per_cap;  // of a product; with a cap, of tanh, and its inverse
  float unit;                 // positive: the largest product is the largest score

  __device__ __forceinline__ Score(float softmax_scale, float softcap)
      : scale(softcap > 0.f ? softmax_scale / softcap : softmax_scale * kLog2e),
        cap(softcap * kLog2e),
        per_cap(softcap > 0.f ? 1.f / cap : 0.f),
        unit(softcap > 0.f || !(scale > 0.f) ? 1.f : scale) {}
  template <int M, int N>
  __device__ __forceinline__ void of(float (&s)[M][N][4]) const {
    const bool capped = cap > 0.f;
    if (!capped && scale > 0.f) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[m][n][e] *= scale;
    if (!capped) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[m][n][e] = cap * tanhf(s[m][n][e]);
  }
  // d score / d (scale q . k), from the score.
  __device__ __forceinline__ float derivative(float score) const {
    return 1.f - score * per_cap * (score * per_cap);
  }
};

// Running maximum (of what Score makes of products, without its unit) and sum of 16 M rows; row 16 m + g + 8 i of lane
// g * 4 + t is [m][i]. Sums are the lane's own until `finish`.
template <int M>
struct Softmax {
  float top[M][2], sum[M][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) top[m][i] = -kInfinity, sum[m][i] = 0.f;
  }

  // Turns scores into probabilities relative to the new maxima. What was accumulated is brought to them by `fade`.
  template <int N>
  __device__ __forceinline__ void step(float (&s)[M][N][4], float (&fade)[M][2], float unit) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float highest = top[m][i];
#pragma unroll
        for (int n = 0; n < N; n++) highest = fmaxf(highest, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
        const float base = highest == -kInfinity ? 0.f : highest * unit;  // nothing seen yet: not inf - inf
        fade[m][i] = exp2_fast(fmaf(top[m][i], unit, -base));
        top[m][i] = highest;
        float added = 0.f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; e++) added += s[m][n][e] = exp2_fast(fmaf(s[m][n][e], unit, -base));
        sum[m][i] = sum[m][i] * fade[m][i] + added;
      }
  }
  template <int kColumns>
  static __device__ __forceinline__ void rescale(float (&acc)[M][kColumns][4], const float (&fade)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int c = 0; c < kColumns; c++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[m][c][e] *= fade[m][e / 2];
  }

  // Sums of whole rows, the sink (a score like another, without a value) among them. Gives what to multiply a row's
  // products by, and its lse in base 2: -inf, and zeros, for a row that has seen nothing.
  __device__ __forceinline__ void finish(float sink, float unit, float (&factor)[M][2], float (&lse)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float total = sum[m][i];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        const float scores = top[m][i] * unit, highest = fmaxf(scores, sink);
        const float base = highest == -kInfinity ? 0.f : highest;
        const float fade = exp2_fast(scores - base);
        total = total * fade + exp2_fast(sink - base);
        factor[m][i] = total > 0.f ? fade / total : 0.f;
        lse[m][i] = total > 0.f ? base + log2f(total) : -kInfinity;
      }
  }
};

}  // namespace pyllm
