// Entry point of sampling for bind_cuda_sampling.cpp. What it computes is in sampling_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; strides count elements; a row of logits is dense.
struct Sampling {
  const void* logits;     // (rows, vocab)
  const double* uniform;  // (rows) in [0, 1)
  int64_t* tokens;        // (rows)
  int64_t rows, vocab, stride;
  float temperature;      // > 0
  int64_t top_k;          // 1 to vocab; vocab: all
  double top_p;           // 0 to 1; 1: all
  float min_p;            // 0 to 1; 0: all
  DType dtype;
};

// Of the most tokens: 2^19 weights of at most 2^44 add up in 64 bits.
constexpr int64_t kMostSampled = int64_t(1) << 19;

// Enqueues on `stream`; returns a CUDA error code, 0 for success.
int sample(const Sampling& args, void* stream);

}  // namespace pyllm
