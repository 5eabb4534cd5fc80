// Cross-entropy on the CPU: arguments of the kernels. Sizes and strides are in elements.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// The formulas are in kernels/cross_entropy/reference.py. "Wide" is float32, float64 where logits are.
struct CrossEntropy {
  const void* logits;     // (rows, cols), rows x_stride apart
  const int64_t* target;  // (rows): a class in [0, cols) or ignore_index, which the caller has checked
  const void* weight;     // (cols) wide, or null
  const void* dloss;      // (rows) wide, dloss_stride apart (0: one for all); backward
  void* loss;             // (rows) wide; forward
  void* lse;              // (rows) wide; forward writes, backward reads it
  int64_t* predictions;   // (rows) most likely class, or null; forward
  void* dlogits;          // (rows, cols), contiguous, the logits' dtype; may be the logits themselves; backward
  int64_t rows, cols, x_stride, dloss_stride, ignore_index;
  double label_smoothing, z_loss, softcap, weight_sum;  // weight_sum: of weight, or cols without one
  int dtype;
};

PYLLM_DECLARE_CPU(cross_entropy_fwd, const CrossEntropy&)
PYLLM_DECLARE_CPU(cross_entropy_bwd, const CrossEntropy&)
// Both, row by row: the second reading of a row comes from the cache.
PYLLM_DECLARE_CPU(cross_entropy_step, const CrossEntropy&)

}  // namespace pyllm
