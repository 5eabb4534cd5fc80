// Attention's entry points for bind_cuda_attention.cpp. The formulas are in kernels/attention/reference.py.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Elements between neighbours in batch, row and head. Packed sequences have no batch: 0.
struct AttentionStride {
  int64_t batch, row, head;
};

// Device pointers; heads have a dense last dimension. Query i sees key j when i' - left <= j <= i' + right, i' = i + S - T;
// -1 is no bound.
struct Attention {
  const void* q;        // (B, T, H, D); packed: (T, H, D), rows of all sequences
  const void* k;        // (B, S, Hkv, D); packed: (S, Hkv, D)
  const void* v;
  const float* sinks;   // (H), or null
  const int32_t* cu_q;  // (B + 1) where each sequence starts, in order, and the last ends; null: not packed
  const int32_t* cu_k;
  void* out;            // as q, contiguous
  float* lse;           // (B, H, T); packed: (H, T)
  int64_t B, T, S, H, Hkv, D;
  AttentionStride q_stride, k_stride, v_stride;
  int64_t left, right;
  float scale, softcap;
  DType dtype;
  bool hopper;          // of the forward: attention_hopper.cuh's, for what hopper_refuses lets through
};

struct AttentionBackward {
  Attention forward;    // out and lse as the forward left them
  const void* dout;     // as out
  const float* dlse;    // as lse, or null
  float* delta;         // as lse: room for the sums of out * dout, less dlse, which are also wanted for the sinks' gradient
  void* dq;             // as q, k and v, contiguous
  void* dk;
  void* dv;
  AttentionStride out_stride, dout_stride;
};

struct AttentionDecode {
  const void* q;               // (B, T, H, D)
  const void* k;               // (B, S, Hkv, D); paged: (blocks, S, Hkv, D), S the keys of a block
  const void* v;
  void* out;                   // (B, T, H, D), contiguous
  const void* lengths;         // (B) int32 or int64: valid keys, the T newest tokens' among them
  const int32_t* block_table;  // (B, table_width), or null
  float* part;                 // (splits, B, T, H, D) where splits > 1
  float* part_lse;             // (splits, B, T, H)
  int64_t B, T, S, H, Hkv, D, blocks, table_width, table_stride, splits;
  AttentionStride q_stride, k_stride, v_stride;
  int64_t left;
  float scale, softcap;
  bool lengths_are_32_bits;
  DType dtype;
};

// Why the forward for Hopper cannot run this: the tensor and what is wrong with it; null when it can, on such a GPU.
const char* hopper_refuses(const Attention& args);
// Whether it is part of this build: PYLLM_CUDA_ARCHS had 90.
bool has_hopper();

// Each enqueues on `stream`; returns a CUDA error code, 0 for success.
int attention_fwd(const Attention& args, void* stream);
int attention_bwd(const AttentionBackward& args, void* stream);
int attention_decode(const AttentionDecode& args, void* stream);

// Into how many blocks the cache of a sequence, of at most `keys` keys, is best split on a GPU of so many multiprocessors.
int64_t attention_decode_splits(int64_t B, int64_t T, int64_t keys, int64_t H, int64_t Hkv, int64_t multiprocessors);

// One dtype of each, in a source file of its own: they compile side by side.
template <class T>
int attention_fwd_of(const Attention& args, void* stream);
template <class T>
int attention_hopper_of(const Attention& args, void* stream);
template <class T>
int attention_bwd_of(const AttentionBackward& args, void* stream);
template <class T>
int attention_decode_of(const AttentionDecode& args, void* stream);

}  // namespace pyllm
