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

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "rms_norm/rms_norm_cuda.h"

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

using namespace pyllm;
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

// rms_norm_fwd(x, residual_or_0, weight, y, h_or_0, rstd, rows, cols, x_stride, residual_stride, eps, offset, x_dtype,
//              residual_dtype, weight_dtype, stream)
//   h = round(x + residual) or x; rstd = 1 / sqrt(mean(h^2) + eps); y = h * rstd * (offset + weight)
//   x, residual (rows, cols); weight (cols); y (rows, cols) in x's dtype; h (rows, cols) in the residual's; rstd (rows)
//   float32. residual_dtype: x's or float32 (ignored without residual). weight_dtype: x's or float32.
void bind_rms_norm_fwd(py::module_& m) {
  m.def("rms_norm_fwd", [](Address x, Address residual, Address weight, Address y, Address h, Address rstd,
                           int64_t rows, int64_t cols, int64_t x_stride, int64_t residual_stride, float eps,
                           float offset, int x_dtype, int residual_dtype, int weight_dtype, Address stream) {
    const Checked check{"rms_norm_fwd"};
    check.size("rows", rows);
    check.size("cols", cols, kMostColumns);
    check.size("x_stride", x_stride);
    check.size("residual_stride", residual_stride);
    const bool empty = rows == 0 || cols == 0;
    check.require((residual == 0) == (h == 0) || empty, "residual and h must be given together");
    RmsNormForward args;
    args.x = check.pointer("x", x, empty);
    args.residual = check.pointer("residual", residual, true);
    args.weight = check.pointer("weight", weight, empty);
    args.y = check.pointer("y", y, empty);
    args.h = check.pointer("h", h, true);
    args.rstd = check.pointer<float>("rstd", rstd, rows == 0);
    args.rows = rows;
    args.cols = cols;
    args.x_stride = x_stride;
    args.residual_stride = residual_stride;
    args.eps = eps;
    args.offset = offset;
    args.x_dtype = check.dtype("x_dtype", x_dtype);
    args.residual_dtype = check.dtype("residual_dtype", residual_dtype);
    args.weight_dtype = check.dtype("weight_dtype", weight_dtype);
    if (residual) check.dtype_fits("residual_dtype", args.residual_dtype, "x", args.x_dtype);
    check.dtype_fits("weight_dtype", args.weight_dtype, "x", args.x_dtype);
    check.succeeded(rms_norm_fwd(args, reinterpret_cast<void*>(stream)));
  });
}

// rms_norm_bwd(dy, dh_or_0, x, weight, rstd, dx, dweight, partial, parts, rows, cols, dy_stride, dh_stride, x_stride,
//              offset, dy_dtype, x_dtype, weight_dtype, stream)
//   x (rows, cols) is what was normalised, h in the add form; dx (rows, cols) in x's dtype is the norm's gradient plus
//   dh; dh (rows, cols) in x's dtype; dweight (cols) float32; partial (parts, cols) float32 scratch.
//   dy_dtype: x's, or any where x is float32. weight_dtype: x's or float32. The same bits for the same `parts`.
void bind_rms_norm_bwd(py::module_& m) {
  m.def("rms_norm_bwd", [](Address dy, Address dh, Address x, Address weight, Address rstd, Address dx, Address dweight,
                           Address partial, int64_t parts, int64_t rows, int64_t cols, int64_t dy_stride,
                           int64_t dh_stride, int64_t x_stride, float offset, int dy_dtype, int x_dtype,
                           int weight_dtype, Address stream) {
    const Checked check{"rms_norm_bwd"};
    check.require(parts >= 1 && parts <= INT32_MAX, "parts must be between 1 and ", INT32_MAX, ", got ", parts);
    check.size("rows", rows);
    check.size("cols", cols, kMostColumns);
    check.size("dy_stride", dy_stride);
    check.size("dh_stride", dh_stride);
    check.size("x_stride", x_stride);
    const bool empty = rows == 0 || cols == 0;
    RmsNormBackward args;
    args.dy = check.pointer("dy", dy, empty);
    args.dh = check.pointer("dh", dh, true);
    args.x = check.pointer("x", x, empty);
    args.weight = check.pointer("weight", weight, cols == 0);
    args.rstd = check.pointer<float>("rstd", rstd, empty);
    args.dx = check.pointer("dx", dx, empty);
    args.dweight = check.pointer<float>("dweight", dweight, cols == 0);
    args.partial = check.pointer<float>("partial", partial, cols == 0);
    args.parts = parts;
    args.rows = rows;
    args.cols = cols;
    args.dy_stride = dy_stride;
    args.dh_stride = dh_stride;
    args.x_stride = x_stride;
    args.offset = offset;
    args.dy_dtype = check.dtype("dy_dtype", dy_dtype);
    args.x_dtype = check.dtype("x_dtype", x_dtype);
    args.weight_dtype = check.dtype("weight_dtype", weight_dtype);
    check.dtype_fits("x_dtype", args.x_dtype, "dy", args.dy_dtype);
    check.dtype_fits("weight_dtype", args.weight_dtype, "x", args.x_dtype);
    check.succeeded(rms_norm_bwd(args, reinterpret_cast<void*>(stream)));
  });
  // rms_norm_bwd_parts(rows, cols, sm_count) -> parts, at least 1
  m.def("rms_norm_bwd_parts", [](int64_t rows, int64_t cols, int64_t sm_count) {
    const Checked check{"rms_norm_bwd_parts"};
    check.size("rows", rows);
    check.size("cols", cols, kMostColumns);
    return rms_norm_bwd_parts(rows, cols, sm_count);
  });
}

// "80,90" to ["sm_80", "sm_90"]: what the module has machine code for.
std::vector<std::string> arch_list() {
  std::vector<std::string> out;
  std::istringstream text(PYLLM_CUDA_ARCHS);
  for (std::string arch; std::getline(text, arch, ',');) out.push_back("sm_" + arch);
  return out;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  bind_rms_norm_fwd(m);
  bind_rms_norm_bwd(m);
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
