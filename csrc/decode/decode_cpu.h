// One step of decoding on the CPU, a whole model in one call: what it is told. Pointers, sizes and strides in elements.
//
//   x = embedding[id]
//   each layer:  q, k, v = W norm(x) + bias     k, v -> the cache     x += Wo attention(rope(q), cache)
//                x += Wdown (silu(Wgate norm(x)) * Wup norm(x))
//   logits = Whead norm(x)
//
// Names: R rows of the cache, T new tokens of each, M = R T tokens in all, C hidden, H query heads, Hkv key-value heads,
// D head_dim, F intermediate, V vocab, N outputs and K inputs of a matrix.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// How a matrix lies in memory, after the dtype codes of cpu.h: see quantized.h.
constexpr int64_t kInt8 = 4, kInt4 = 5;

// Tables of 64-bit numbers, as Python writes them (kernels/decode/bindings.py).
struct Matrix {
  const void* weight;  // (N, K) contiguous in its dtype, or packed
  const void* scale;   // of a packed one
  const void* bias;    // (N) in the model's dtype, or null
  int64_t kind;        // kFloat32, kBFloat16, kFloat16, kInt8, kInt4
};
struct DecodeLayer {
  Matrix q, k, v, o, gate, up, down;
  const void *input_norm, *post_norm;  // (C) in the model's dtype
  const void *q_norm, *k_norm;         // (D), or null
  int64_t window;                      // a query sees so many keys, its own among them; 0: all
};
struct DecodeCache {
  void *keys, *values;  // (R, columns, Hkv, D) in the model's dtype
  int64_t row_stride;
  const uint8_t* mask;  // (R, T, columns): whether a query sees a column; null: causality and the window say it
  int64_t mask_row, mask_query;
};

struct DecodeStep {
  const DecodeLayer* layers;
  const DecodeCache* caches;  // one per layer
  const void* embedding;      // (V, C) in the model's dtype
  const void* norm;           // (C)
  Matrix head;                // (V, C)
  const int64_t* ids;         // (M)
  const float *cos, *sin;     // (R, T, D / 2), rows angle_stride apart (0: all alike)
  int64_t angle_stride;
  const int32_t* first;  // (R) the column of each row's first new token; its others follow
  const int32_t* ends;   // (R) columns filled, the new ones included
  float* logits;         // (R, keep, V), after the last `keep` tokens of every row
  int64_t L, R, T, keep, C, H, Hkv, D, F, V;
  int64_t bytes;  // of all weights: what the threads share
  float eps;
  bool ring;  // the columns are in no order: a query sees all that are filled
  int dtype;  // of embedding, norms, biases and cache
};

// y = W x + bias for packed matrices, any number of rows
struct PackedLinear {
  Matrix w;
  const void* x;  // (rows, K), rows x_stride apart, x_dtype
  void* y;        // (rows, N) contiguous, x_dtype
  int64_t rows, N, K, x_stride;
  int dtype;
};

PYLLM_DECLARE_CPU(decode_step, const DecodeStep&)
PYLLM_DECLARE_CPU(packed_linear, const PackedLinear&)

}  // namespace pyllm
