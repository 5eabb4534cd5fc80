// The bindings of rms_norm_cuda.h. Conventions are in bind_cuda.cpp.
#include "bind_cuda.h"
#include "rms_norm/rms_norm_cuda.h"

namespace pyllm {
namespace {

// rms_norm_fwd(x, residual_or_0, weight, y, h_or_0, rstd, rows, cols, x_stride, residual_stride, eps, offset, x_dtype,
//              residual_dtype, weight_dtype, stream)
//   h = round(x + residual) or x; rstd = 1 / sqrt(mean(h^2) + eps); y = h * rstd * (offset + weight)
//   x, residual (rows, cols); weight (cols); y (rows, cols) in x's dtype; h (rows, cols) in the residual's; rstd (rows)
//   float32. residual_dtype: x's or float32 (ignored without residual). weight_dtype: x's or float32.
void bind_rms_norm_fwd(pybind11::module_& m) {
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
void bind_rms_norm_bwd(pybind11::module_& m) {
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

}  // namespace

void bind_rms_norm(pybind11::module_& m) {
  bind_rms_norm_fwd(m);
  bind_rms_norm_bwd(m);
}

}  // namespace pyllm
