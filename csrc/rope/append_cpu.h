// Rotary embedding of new tokens and their entry into a key-value cache on the CPU: arguments of the kernel. Sizes and
// strides are in elements.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// New token t of sequence b has position p = lengths[b] - T + t. q and k are turned by row p of the tables (rope_cpu.h
// has the formula), q to q_out, k to place p of k_cache, v to place p of v_cache as it is. Place p is (b, p), or with a
// block table (blocks[b, p / places], p % places). Tokens with negative p only have q turned, by row 0.
struct RopeAppend {
  const void* q;           // (B, T, H, D), last dimension dense, as are k's and v's
  const void* k;           // (B, T, Hkv, D)
  const void* v;
  void* q_out;             // (B, T, H, D), contiguous
  void* k_cache;           // (B or blocks, places, Hkv, D)
  void* v_cache;
  const void* cos;         // (P, R/2), float32 (float64 when q is)
  const void* sin;
  const int64_t* lengths;  // (B)
  const int32_t* blocks;   // (B, columns), rows block_stride apart, or null
  int64_t B, T, H, Hkv, D, R, places;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // of B, T, heads
  int64_t k_cache_stride[4], v_cache_stride[4];   // of all four dimensions
  int64_t cos_stride, sin_stride, table_step, block_stride;
  bool interleaved;
  int dtype;
};

PYLLM_DECLARE_CPU(rope_append, const RopeAppend&)

}  // namespace pyllm
