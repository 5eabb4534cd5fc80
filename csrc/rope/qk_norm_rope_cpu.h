// QK-norm and rotary embedding in one pass on the CPU: arguments of the kernels. Sizes and strides are in elements.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// Where the tokens' angles lie: R/2 values per table row, `step` apart.
struct RopeTable {
  const void* cos;           // float32 (float64 when q is)
  const void* sin;
  const int64_t* positions;  // (B, T), contiguous: table row of each token; null: row t of batch b's table
  int64_t cos_stride[2], sin_stride[2];  // of B, T
  int64_t step;
  bool interleaved;
};

// q's heads, or k's.
struct QkNormSide {
  const void* x;       // (B, T, heads, D), last dimension dense
  const void* weight;  // (D), float32 (float64 when x is)
  void* y;             // (B, T, heads, D), contiguous; backward: dx
  void* rstd;          // (B, T, heads), contiguous, float32 (float64 when x is); backward reads it
  const void* dy;      // backward: (B, T, heads, D), last dimension dense
  void* dweight;       // backward: (D), float32 (float64 when x is)
  int64_t heads;
  int64_t x_stride[3], dy_stride[3];  // of B, T, heads
};

// Every head of D elements: n = x * rstd * (offset + weight), rstd = 1 / sqrt(mean(x^2) + eps); then the first R of its
// elements turned by the token's angles, as rope_cpu.h has it.
struct QkNormRope {
  QkNormSide sides[2];
  RopeTable table;
  int64_t B, T, D, R;
  double eps, offset;
  int dtype;
};

PYLLM_DECLARE_CPU(qk_norm_rope_fwd, const QkNormRope&)
PYLLM_DECLARE_CPU(qk_norm_rope_bwd, const QkNormRope&)

}  // namespace pyllm
