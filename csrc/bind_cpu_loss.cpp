// The loss's and the linear layers' part of the module pyllm.kernels._cpu. Conventions: bind_cpu.cpp.
#include "bind_cpu.h"
#include "cross_entropy/cross_entropy_cpu.h"

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
}

}  // namespace pyllm
