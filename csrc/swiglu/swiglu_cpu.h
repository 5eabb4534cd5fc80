// SwiGLU on the CPU: arguments of the kernels. Sizes and strides are in elements; all tensors have one dtype.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// y = silu(gate) * up
struct SwigluFwd {
  const void* gate;  // (rows, cols), rows gate_stride apart
  const void* up;    // (rows, cols)
  void* y;           // (rows, cols), contiguous
  int64_t rows, cols, gate_stride, up_stride;
  int dtype;
};

struct SwigluBwd {
  const void* dy;    // (rows, cols), as are all of these
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t rows, cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride;
  int dtype;
};

PYLLM_DECLARE_CPU(swiglu_fwd, const SwigluFwd&)
PYLLM_DECLARE_CPU(swiglu_bwd, const SwigluBwd&)

}  // namespace pyllm
