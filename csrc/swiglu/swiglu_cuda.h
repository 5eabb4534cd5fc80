// SwiGLU's entry points for bind_cuda.cpp. The formulas are in swiglu_cuda.cu.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace pyllm {

// Device pointers; all tensors have one dtype; rows have unit column stride, strides count elements.
struct SwigluForward {
  const void* gate;  // (rows, cols)
  const void* up;    // (rows, cols)
  void* y;           // (rows, cols), contiguous
  int64_t rows, cols, gate_stride, up_stride;
  DType dtype;
};

struct SwigluBackward {
  const void* dy;    // (rows, cols), as are all of these
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride;
  DType dtype;
};

// Enqueue on `stream`; return a CUDA error code, 0 for success.
int swiglu_fwd(const SwigluForward& args, void* stream);
int swiglu_bwd(const SwigluBackward& args, void* stream);

}  // namespace pyllm
