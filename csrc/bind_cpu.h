// What the files that bind CPU kernels share: the checks of arguments, and the instruction set in use.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/cpu.h"

namespace py = pybind11;

namespace pyllm {

extern Isa isa;  // chosen when the module is imported: bind_cpu.cpp

void bind_rope(py::module_& m);  // bind_cpu_rope.cpp
void bind_loss(py::module_& m);  // bind_cpu_loss.cpp
void bind_attention(py::module_& m);  // bind_cpu_attention.cpp
void bind_decode(py::module_& m);  // bind_cpu_decode.cpp

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

inline void check_size(int64_t size, const char* name) {
  if (size < 0) fail(std::string(name) + " must not be negative, got " + std::to_string(size));
}

// A fake or meta tensor has data_ptr() == 0; with anything to read or write behind it that must not reach a kernel.
template <class T = void>
inline T* pointer(uintptr_t address, const char* name, int64_t elements) {
  if (!address && elements > 0) fail(std::string(name) + " is a null pointer (a fake or meta tensor?)");
  return reinterpret_cast<T*>(address);
}

inline int64_t bytes_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

inline void check_dtype(int code, const char* name) {
  if (code < kFloat32 || code > kFloat64)
    fail(std::string(name) + " must be a dtype code from 0 to 3, got " + std::to_string(code));
}

// float64 computes in float64 and mixes with nothing.
inline void check_dtypes(int a, const char* a_name, int b, const char* b_name) {
  check_dtype(a, a_name);
  check_dtype(b, b_name);
  if ((a == kFloat64) != (b == kFloat64))
    fail(std::string(a_name) + " and " + b_name + " must both be float64 or neither");
}

}  // namespace pyllm
