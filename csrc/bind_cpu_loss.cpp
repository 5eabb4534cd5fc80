// The loss's and the linear layers' part of the module pyllm.kernels._cpu. Conventions: bind_cpu.cpp.
#include "bind_cpu.h"
#include "cross_entropy/cross_entropy_cpu.h"
#include "linear/linear_cpu.h"

namespace pyllm {
namespace {

// The first target that is neither a class nor ignore_index, or -1: it would have foreign memory read.
int64_t bad_target(const CrossEntropy& a) {
  for (int64_t row = 0; row < a.rows; row++)
    if (a.target[row] != a.ignore_index && (a.target[row] < 0 || a.target[row] >= a.cols)) return row;
  return -1;
}

enum Pass { kForward, kBackward, kStep };

// Row of the first bad target, before anything is computed; -1 when all are good.
template <Pass kPass>
int64_t cross_entropy(uintptr_t logits, uintptr_t target, uintptr_t weight, uintptr_t dloss, uintptr_t loss,
                      uintptr_t lse, uintptr_t predictions, uintptr_t dlogits, int64_t rows, int64_t cols,
                      int64_t x_stride, int64_t dloss_stride, int64_t ignore_index, double label_smoothing,
                      double z_loss, double softcap, double weight_sum, int dtype) {
  check_size(rows, "rows");
  check_size(cols, "cols");
  check_dtype(dtype, "dtype");
  if (kPass == kStep && dtype != kFloat32 && dtype != kFloat64)
    fail("dtype must be float32 or float64 in one step, got code " + std::to_string(dtype));
  const int64_t n = rows * cols, forward = kPass == kBackward ? 0 : rows, backward = kPass == kForward ? 0 : n;
  CrossEntropy a{pointer(logits, "logits", n), pointer<const int64_t>(target, "target", rows),
                 pointer(weight, "weight", 0), pointer(dloss, "dloss", backward), pointer(loss, "loss", forward),
                 pointer(lse, "lse", rows), pointer<int64_t>(predictions, "predictions", 0),
                 pointer(dlogits, "dlogits", backward), rows, cols, x_stride, dloss_stride, ignore_index,
                 label_smoothing, z_loss, softcap, weight_sum, dtype};
  const int64_t bad = bad_target(a);
  if (bad >= 0) return bad;
  py::gil_scoped_release no_gil;
  if (kPass == kForward) {
    PYLLM_CALL_CPU(isa, cross_entropy_fwd, a);
  } else if (kPass == kBackward) {
    expect_output(a.dlogits, n * bytes_of(dtype));
    PYLLM_CALL_CPU(isa, cross_entropy_bwd, a);
  } else {
    PYLLM_CALL_CPU(isa, cross_entropy_step, a);
  }
  return -1;
}

void check_float(int code, const char* name) {
  if (code < kFloat32 || code > kFloat16)
    fail(std::string(name) + " must be a dtype code from 0 to 2, got " + std::to_string(code));
}

void gemm(uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t c, int64_t M, int64_t N, int64_t K, int64_t a_row,
          int64_t a_col, int64_t b_row, int64_t b_col, int64_t c_row, bool accumulate, int a_dtype, int b_dtype,
          int c_dtype) {
  check_size(M, "M");
  check_size(N, "N");
  check_size(K, "K");
  check_float(a_dtype, "a_dtype");
  check_float(b_dtype, "b_dtype");
  check_float(c_dtype, "c_dtype");
  if (accumulate && c_dtype != kFloat32) fail("c must be float32 to accumulate, got code " + std::to_string(c_dtype));
  if (accumulate && bias) fail("bias must be null to accumulate: c holds it already");
  const bool any = M * N > 0;
  Gemm g{pointer(a, "a", any ? K : 0), pointer(b, "b", any ? K : 0), pointer(bias, "bias", 0),
         pointer(c, "c", M * N), M, N, K, a_row, a_col, b_row, b_col, c_row, accumulate, a_dtype, b_dtype, c_dtype};
  py::gil_scoped_release no_gil;
  if (any) expect_output(g.c, ((M - 1) * c_row + N) * bytes_of(c_dtype));
  PYLLM_CALL_CPU(isa, gemm, g);
}

void column_sums(uintptr_t x, uintptr_t sums, int64_t M, int64_t N, int64_t x_row, bool accumulate, int dtype) {
  check_size(M, "M");
  check_size(N, "N");
  check_float(dtype, "dtype");
  ColumnSums a{pointer(x, "x", M * N), pointer(sums, "sums", N), M, N, x_row, accumulate, dtype};
  py::gil_scoped_release no_gil;
  PYLLM_CALL_CPU(isa, column_sums, a);
}

}  // namespace

void bind_loss(py::module_& m) {
  using py::arg;
  const auto define = [&](const char* name, auto function) {
    m.def(name, function, arg("logits"), arg("target"), arg("weight"), arg("dloss"), arg("loss"), arg("lse"),
          arg("predictions"), arg("dlogits"), arg("rows"), arg("cols"), arg("x_stride"), arg("dloss_stride"),
          arg("ignore_index"), arg("label_smoothing"), arg("z_loss"), arg("softcap"), arg("weight_sum"), arg("dtype"));
  };
  define("cross_entropy_fwd", &cross_entropy<kForward>);
  define("cross_entropy_bwd", &cross_entropy<kBackward>);
  define("cross_entropy_step", &cross_entropy<kStep>);
  m.def("gemm", &gemm, arg("a"), arg("b"), arg("bias"), arg("c"), arg("M"), arg("N"), arg("K"), arg("a_row"),
        arg("a_col"), arg("b_row"), arg("b_col"), arg("c_row"), arg("accumulate"), arg("a_dtype"), arg("b_dtype"),
        arg("c_dtype"));
  m.def("column_sums", &column_sums, arg("x"), arg("sums"), arg("M"), arg("N"), arg("x_row"), arg("accumulate"),
        arg("dtype"));
}

}  // namespace pyllm
