// RMSNorm on the CPU: arguments of the kernels. Sizes and strides are in elements.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// y = h * rstd * (offset + weight),  rstd = 1 / sqrt(mean(h^2) + eps),  h = x or, given a residual, x + residual
struct RmsNormFwd {
  const void* x;         // (rows, cols), rows x_stride apart
  const void* residual;  // the same shape, or null
  const void* weight;    // (cols), float32 (float64 when x is)
  void* y;               // (rows, cols), contiguous, x's dtype
  void* h;               // (rows, cols), contiguous, the residual's dtype: x + residual, rounded; null without residual
  void* rstd;            // (rows), float32 (float64 when x is)
  int64_t rows, cols, x_stride, residual_stride;
  double eps, offset;
  int x_dtype, residual_dtype;
};

// x is what was normalised (h above). dx = gradient through the norm + dh.
struct RmsNormBwd {
  const void* dy;      // (rows, cols)
  const void* dh;      // gradient of h from elsewhere, x's dtype, or null
  const void* x;       // (rows, cols)
  const void* weight;  // (cols), float32 (float64 when x is)
  const void* rstd;    // (rows), float32 (float64 when x is)
  void* dx;            // (rows, cols), contiguous, x's dtype
  void* dweight;       // (cols), float32 (float64 when x is)
  int64_t rows, cols, dy_stride, dh_stride, x_stride;
  double offset;
  int dy_dtype, x_dtype;
};

PYLLM_DECLARE_CPU(rms_norm_fwd, const RmsNormFwd&)
PYLLM_DECLARE_CPU(rms_norm_bwd, const RmsNormBwd&)

}  // namespace pyllm
