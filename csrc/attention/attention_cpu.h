// Attention on the CPU: arguments of the kernels. Sizes and strides are in elements. Formulas: kernels/attention/reference.py.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// From one element to the next along the dimensions of (B, T, H, D); packed (T, H, D) has no b.
struct Strides {
  int64_t b, t, h, d;
};

// B sequences. Their queries and keys lie in one of three ways:
//   dense   q (B, T, H, D), k and v (B, S, Hkv, D)
//   packed  q (T, H, D), k and v (S, Hkv, D); sequence i is the rows cu_q[i] to cu_q[i + 1], and so with cu_k
//   cache   dense, of whose keys the first lengths[i] count; with a table k and v are (blocks, block_size, Hkv, D), and
//           table[i * table_stride + j] is the block with the keys j * block_size and on of sequence i
// Query i is at the position of key i + (keys) - (queries). It sees `left` keys before that, `right` behind; -1: all.
struct AttentionShape {
  int64_t B, T, S, H, Hkv, D;
  const int32_t *cu_q, *cu_k;  // packed, else null
  const int64_t* lengths;      // cache, else null
  const int32_t* table;        // paged cache, else null
  int64_t table_stride, block_size;
  Strides q_stride, k_stride, v_stride;
  double scale, softcap;
  int64_t left, right;
  int dtype;
};

struct AttentionFwd {
  AttentionShape shape;
  const void *q, *k, *v;
  const void* sinks;  // (H), float32 (float64 when q is), or null
  void* out;          // as q, contiguous
  void* lse;          // (B, H, T), packed (H, T), float32 (float64 when q is), or null
};

struct AttentionBwd {
  AttentionShape shape;
  const void *q, *k, *v;
  const void *out, *dout;  // as q
  Strides out_stride, dout_stride;
  const void *lse, *dlse;  // contiguous; dlse may be null
  const void* sinks;       // (H), float32 (float64 when q is), or null
  void *dq, *dk, *dv;      // contiguous
  void* delta;             // scratch like lse, and only then
  void* dsinks;            // (H), both null without sinks
};

PYLLM_DECLARE_CPU(attention_fwd, const AttentionFwd&)
PYLLM_DECLARE_CPU(attention_few, const AttentionFwd&)  // the same for a few queries of every sequence
PYLLM_DECLARE_CPU(attention_bwd, const AttentionBwd&)

}  // namespace pyllm
