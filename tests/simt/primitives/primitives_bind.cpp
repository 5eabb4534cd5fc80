// Python module of the kernels in this folder, for the SIMT machine (with its controls) or a GPU.
#include <pybind11/pybind11.h>

#include <stdexcept>

#if defined(PYLLM_SIMT_MODULE)
#include "bindings.h"
#endif
#include "primitives.h"

namespace {

template <int (*run_one)(const std::string&, const Operands&, void*)>
void run(const std::string& name, uintptr_t a, uintptr_t b, uintptr_t out, int n, uintptr_t stream) {
  const Operands operands{reinterpret_cast<void*>(a), reinterpret_cast<void*>(b), reinterpret_cast<void*>(out), n};
  const int error = run_one(name, operands, reinterpret_cast<void*>(stream));
  if (error) throw std::runtime_error(name + ": " + (error < 0 ? "no such kernel" : "CUDA error " + std::to_string(error)));
}

}  // namespace

PYBIND11_MODULE(_primitives, m) {
  m.def("run", &run<run_primitive>);
#if defined(PYLLM_SM90A)
  m.def("run_hopper", &run<run_hopper_primitive>);
#endif
#if defined(PYLLM_SIMT_MODULE)
  simt::bind(m);
#endif
}
