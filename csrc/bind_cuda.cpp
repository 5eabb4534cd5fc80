// pyllm.kernels._cuda: the CUDA kernels by raw pointer. Knows neither torch nor its version; the CUDA runtime is linked
// statically, so that the module imports where there is no driver.
//
// Conventions of every function: pointers are device addresses as integers, 0 where an optional tensor is absent; sizes
// and strides count elements; rows have unit column stride; outputs are contiguous; dtype codes are those of
// common/dtype.h; `stream` is a CUDA stream handle as an integer, 0 the default one. A call only enqueues.
// Raises ValueError, before anything is launched, for an argument that cannot be right, and names it; RuntimeError with
// CUDA's own text when the launch is refused.
//
// With -DPYLLM_SIMT_MODULE the same file makes the test module _simt, whose kernels run on the CPU (tests/simt).
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bind_cuda.h"

#if defined(PYLLM_SIMT_MODULE)
#include "bindings.h"
#define MODULE_NAME _simt
#else
#define MODULE_NAME _cuda
#endif
#ifndef PYLLM_CUDA_ARCHS
#define PYLLM_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

// "80,90" to ["sm_80", "sm_90"]: what the module has machine code for.
std::vector<std::string> arch_list() {
  std::vector<std::string> out;
  std::istringstream text(PYLLM_CUDA_ARCHS);
  for (std::string arch; std::getline(text, arch, ',');) out.push_back("sm_" + arch);
  return out;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  pyllm::bind_attention(m);
  pyllm::bind_cross_entropy(m);
  pyllm::bind_rms_norm(m);
  pyllm::bind_rope(m);
  pyllm::bind_sampling(m);
  pyllm::bind_swiglu(m);
  m.attr("arch_list") = arch_list();
  m.def(
      "device_count",
      [] {
        int count = 0;
        return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
      },
      "GPUs that this module's CUDA runtime sees; 0 without a driver");
  m.def(
      "runtime_error",
      [] {
        int count = 0;
        const cudaError_t error = cudaGetDeviceCount(&count);
        return error == cudaSuccess ? std::string() : std::string(cudaGetErrorString(error));
      },
      "why the CUDA runtime does not work here; empty when it does");
#if defined(PYLLM_SIMT_MODULE)
  simt::bind(m);
#endif
}
