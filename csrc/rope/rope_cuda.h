// RoPE's entry point for bind_cuda.cpp. The formula is in rope_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; strides count elements; q and k have a dense last dimension and one dtype.
struct Rope {
  const void* q;             // (B, T, H, D)
  const void* k;             // (B, T, Hkv, D)
  void* q_out;               // (B, T, H, D), contiguous
  void* k_out;               // (B, T, Hkv, D), contiguous
  const float* cos;          // R/2 neighbouring values per table row
  const float* sin;
  const int64_t* positions;  // (B, T), contiguous: table row of each token; null: row t of batch b's table
  int64_t B, T, H, Hkv, D, R;
  int64_t table_rows;
  int64_t q_stride[3], k_stride[3];      // of B, T, H
  int64_t cos_stride[2], sin_stride[2];  // of B, table row
  bool interleaved, conjugate;
  DType dtype;
};

// Enqueues on `stream`; returns a CUDA error code, 0 for success.
int rope(const Rope& args, void* stream);

}  // namespace pyllm
