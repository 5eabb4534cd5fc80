// The arguments of a binding, checked one by one. Conventions of all bindings are in bind_cuda.cpp.
#pragma once
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace pyllm {

using Address = uintptr_t;

// Columns and what else kernels count in 32 bits; rows and offsets have 64.
constexpr int64_t kMostColumns = int64_t(1) << 30;

// The arguments of one call, checked one by one; complaints begin with the op's name.
struct Checked {
  const char* op;

  template <class... Parts>
  void require(bool holds, const Parts&... parts) const {
    if (holds) return;
    std::ostringstream text;
    text << op << ": ";
    (text << ... << parts);
    throw std::invalid_argument(text.str());
  }
  void size(const char* name, int64_t value, int64_t most = INT64_MAX) const {
    require(value >= 0 && value <= most, name, " must be between 0 and ", most, ", got ", value);
  }
  // A pointer to something; empty tensors may have none.
  template <class T = void>
  T* pointer(const char* name, Address address, bool empty) const {
    require(address != 0 || empty, name, " is a null pointer");
    return reinterpret_cast<T*>(address);
  }
  DType dtype(const char* name, int code) const {
    require(code >= 0 && code <= 2, name, " must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", code);
    return DType(code);
  }
  void dtype_fits(const char* name, DType dtype, const char* owner, DType owners) const {
    require(dtype == owners || dtype == DType::kFloat32, name, " must be ", owner, "'s (", int(owners),
            ") or float32 (0), got ", int(dtype));
  }
  void succeeded(int error) const {
    if (error == 0) return;
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
};

// Each adds its op's functions; bind_cuda.cpp calls them all.
void bind_attention(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_rms_norm(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_sampling(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);

}  // namespace pyllm
