// Cross-entropy's entry points for bind_cuda.cpp. The formulas are in cross_entropy_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; logits have unit column stride, strides count elements.
struct CrossEntropy {
  const void* logits;      // (rows, classes)
  const int64_t* target;   // (rows), contiguous
  const float* weight;     // (classes), or null: all one
  const float* weight_sum; // one float; null without weight or without smoothing
  int64_t rows, classes, stride;
  int64_t ignore_index;
  float smoothing, z_loss, softcap;
  DType dtype;
};

struct CrossEntropyForward : CrossEntropy {
  float* loss;  // (rows)
  float* lse;   // (rows)
  float* part;  // (rows, parts, 4) scratch; null where parts is 1
  int64_t parts;
};

struct CrossEntropyBackward : CrossEntropy {
  const float* dloss;    // (rows), dloss_stride apart
  const float* lse;      // (rows)
  void* dlogits;         // (rows, columns), contiguous
  int64_t dloss_stride;
  int64_t columns, first;  // logits and dlogits are of so many of the classes, from `first` on
  DType dlogits_dtype;     // the logits', or any where those are float32
};

// Enqueue on `stream`; return a CUDA error code, 0 for success.
int cross_entropy_fwd(const CrossEntropyForward& args, void* stream);
int cross_entropy_bwd(const CrossEntropyBackward& args, void* stream);

// How many blocks share a row in the forward pass on a GPU with that many multiprocessors: parts of CrossEntropyForward.
int64_t cross_entropy_fwd_parts(int64_t rows, int64_t classes, int64_t sm_count);

}  // namespace pyllm
