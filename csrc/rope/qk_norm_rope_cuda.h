// Entry points of QK-norm and RoPE for bind_cuda_rope.cpp. The formulas are in qk_norm_rope_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; strides count elements; q and k have a dense last dimension and one dtype.
struct QkNormRope {
  const void* q;             // (B, T, H, D)
  const void* k;             // (B, T, Hkv, D)
  const float* q_weight;     // (D)
  const float* k_weight;
  void* q_out;               // as q and k, contiguous: the results, or backward the gradients of q and k
  void* k_out;
  float* rstd_q;             // (B, T, H)
  float* rstd_k;             // (B, T, Hkv)
  const float* cos;          // R/2 neighbouring values per table row
  const float* sin;
  const int64_t* positions;  // (B, T), contiguous: table row of each token; null: row t of batch b's table
  int64_t B, T, H, Hkv, D, R, table_rows;
  int64_t q_stride[3], k_stride[3];      // of B, T, H
  int64_t cos_stride[2], sin_stride[2];  // of B, table row
  float eps, offset;
  bool interleaved;
  DType dtype;
};

struct QkNormRopeBackward {
  QkNormRope forward;
  const void* dq;   // as q and k
  const void* dk;
  float* partial;   // (parts, 2, D): the weights' gradients in `parts` shares of the tokens, q's and k's
  int64_t parts;
  int64_t dq_stride[3], dk_stride[3];
};

// Each enqueues on `stream`; returns a CUDA error code, 0 for success.
int qk_norm_rope_fwd(const QkNormRope& args, void* stream);
int qk_norm_rope_bwd(const QkNormRopeBackward& args, void* stream);

}  // namespace pyllm
