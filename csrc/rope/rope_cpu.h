// Rotary position embedding on the CPU: arguments of the kernel. Sizes and strides are in elements.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// Turns pairs (a, b) of the first R of D dimensions by the token's angles:
//   a' = a cos - b sin,  b' = b cos + a sin
// Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved. conjugate turns the other way: the inverse, and so the
// gradient.
struct Rope {
  const void* q;             // (B, T, H, D), last dimension dense
  const void* k;             // (B, T, Hkv, D), or null
  void* q_out;               // (B, T, H, D), contiguous
  void* k_out;               // (B, T, Hkv, D), contiguous, or null
  const void* cos;           // R/2 values per table row, table_step apart, float32 (float64 when q is)
  const void* sin;
  const int64_t* positions;  // (B, T), contiguous: table row of each token; null: row t of batch b's table
  int64_t B, T, H, Hkv, D, R;
  int64_t q_stride[3], k_stride[3];      // of B, T, H
  int64_t cos_stride[2], sin_stride[2];  // of B, T
  int64_t table_step;
  bool interleaved, conjugate;
  int dtype;
};

PYLLM_DECLARE_CPU(rope, const Rope&)

}  // namespace pyllm
