// Host side of a kernel: dtype codes to template arguments, launches that return their error.
#pragma once
#include "common/device.cuh"
#include "common/dtype.h"

namespace pyllm {

// Handed to a dispatch body in place of a value: decltype(t)::type is the element type.
template <class T>
struct TypeTag {
  using type = T;
};

// body(TypeTag<T>{}) for the element type that `dtype` names. Bodies return a CUDA error code.
template <class Body>
int dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(TypeTag<float>{});
    case DType::kBFloat16: return body(TypeTag<bf16>{});
    case DType::kFloat16: return body(TypeTag<f16>{});
  }
  return int(cudaErrorInvalidValue);
}

// Runs kernel(args...) on `stream`, with `shared_bytes` of shared memory beside what the kernel declares. Returns the
// launch's own error code, 0 when it was accepted; errors while it runs come with a later call, as always with CUDA.
template <class... Params, class... Args>
int launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, int shared_bytes, void* stream, Args... args) {
  if (shared_bytes > 48 << 10) {  // more than that must be asked for, each time, as every device has its own answer
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetLastError(), int(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error != cudaSuccess) cudaGetLastError();  // it is reported here; PyTorch's next check must not find it again
  return int(error);
}

// The same without such memory.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, void* stream, Args... args) {
  return launch_shared(kernel, grid, block, 0, stream, args...);
}

}  // namespace pyllm
