// Python module of the kernels in probes.cu.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"

bool run_probe(const std::string& name, const float* in, float* out, int n, int blocks, int threads, int shared_bytes);

PYBIND11_MODULE(_probes, m) {
  m.def("run", [](const std::string& name, uintptr_t in, uintptr_t out, int n, int blocks, int threads, int shared) {
    if (!run_probe(name, reinterpret_cast<float*>(in), reinterpret_cast<float*>(out), n, blocks, threads, shared))
      throw std::invalid_argument("no probe is called " + name);
  });
  simt::bind(m);
}
