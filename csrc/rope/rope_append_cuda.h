// Entry point of RoPE with entry into the cache for bind_cuda_rope.cpp. The formula is in rope_append_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; strides count elements; q, k and v have a dense last dimension; one dtype but for the tables.
struct RopeAppend {
  const void* q;               // (B, T, H, D)
  const void* k;               // (B, T, Hkv, D)
  const void* v;
  void* q_out;                 // as q, contiguous
  void* k_cache;               // (B, S, Hkv, D); paged: (blocks, S, Hkv, D), S the keys of a block
  void* v_cache;
  const float* cos;            // (table_rows, R/2)
  const float* sin;
  const int64_t* lengths;      // (B): valid keys, the T new ones among them
  const int32_t* block_table;  // (B, table_width), or null
  int64_t B, T, H, Hkv, D, R, S, blocks, table_width, table_stride, table_rows;
  int64_t q_stride[3], k_stride[3], v_stride[3];   // of B, T, H
  int64_t k_cache_stride[3], v_cache_stride[3];    // of B or block, S, Hkv
  int64_t k_cache_step, v_cache_step;              // of D
  int64_t cos_stride, sin_stride;
  bool interleaved;
  DType dtype;
};

// Enqueues on `stream`; returns a CUDA error code, 0 for success.
int rope_append(const RopeAppend& args, void* stream);

}  // namespace pyllm
