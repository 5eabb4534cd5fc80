// RMSNorm's entry points for bind_cuda.cpp. The formulas are in rms_norm_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; rows have unit column stride, strides count elements, outputs are contiguous.
struct RmsNormForward {
  const void* x;         // (rows, cols) x_dtype
  const void* residual;  // (rows, cols) residual_dtype, or null: no addition
  const void* weight;    // (cols) weight_dtype
  void* y;               // (rows, cols) x_dtype
  void* h;               // (rows, cols) residual_dtype; null without residual
  float* rstd;           // (rows)
  int64_t rows, cols, x_stride, residual_stride;
  float eps, offset;
  DType x_dtype;         // any
  DType residual_dtype;  // x's or float32
  DType weight_dtype;    // x's or float32
};

struct RmsNormBackward {
  const void* dy;       // (rows, cols) dy_dtype
  const void* dh;       // (rows, cols) x_dtype, or null: no gradient reaches h but through y
  const void* x;        // (rows, cols) x_dtype: what was normalised, h in the add form
  const void* weight;   // (cols) weight_dtype
  const float* rstd;    // (rows)
  void* dx;             // (rows, cols) x_dtype
  float* dweight;       // (cols)
  float* partial;       // (parts, cols) scratch
  int64_t parts, rows, cols, dy_stride, dh_stride, x_stride;
  float offset;
  DType dy_dtype;       // x's; or half precision where x is float32
  DType x_dtype;        // any
  DType weight_dtype;   // x's or float32
};

// Each returns a CUDA error code, 0 when the launch was accepted.
int rms_norm_fwd(const RmsNormForward& args, void* stream);
int rms_norm_bwd(const RmsNormBackward& args, void* stream);

// Rows of scratch that suit rms_norm_bwd on a GPU of sm_count multiprocessors. Any number >= 1 gives right results.
int64_t rms_norm_bwd_parts(int64_t rows, int64_t cols, int64_t sm_count);

}  // namespace pyllm
