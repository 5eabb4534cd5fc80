// The module pyllm.kernels._cpu: checks arguments, picks the instruction set, calls the kernels without the GIL.
//
// Pointers come as integers (tensor.data_ptr()), sizes and strides as element counts, dtypes as the codes of
// common/cpu.h, so that this module needs no torch headers and serves every torch. Import torch first: its OpenMP
// runtime is then the one this module finds, and both share one pool of threads.
#include "bind_cpu.h"

#include <cstdlib>
#include <new>
#include <utility>

#include "rms_norm/rms_norm_cpu.h"
#include "swiglu/swiglu_cpu.h"

#if PYLLM_X86
#include <cpuid.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyllm {

namespace {
struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};
}  // namespace

void* scratch(size_t bytes) {
  thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, buffer.bytes);
    if (!buffer.data) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

void expect_output(void* p, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kFresh = int64_t(32) << 20;
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  if (bytes < kFresh) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: if refused, all works as before
#else
  (void)p;
  (void)bytes;
#endif
}

Isa isa;

namespace {
bool forked = false;
}  // namespace

int max_threads() { return forked ? 1 : omp_get_max_threads(); }

namespace {

constexpr const char* kIsaNames[] = {"base", "avx2", "avx512"};

#if PYLLM_X86
// Half conversion; __builtin_cpu_supports() knows it by name only in recent compilers.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The widest instruction set of this CPU, or the lower one that the environment variable PYLLM_CPU_ISA names.
Isa pick_isa() {
  Isa best = Isa::base;
#if PYLLM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
  }
#endif
  const char* name = std::getenv("PYLLM_CPU_ISA");
  if (!name || !*name) return best;
  for (int i = 0; i <= int(best); i++)
    if (std::string(name) == kIsaNames[i]) return Isa(i);
  std::string known;
  for (int i = 0; i <= int(best); i++) known += (i ? ", " : "") + std::string(kIsaNames[i]);
  throw py::import_error("PYLLM_CPU_ISA='" + std::string(name) +
                         "' is unknown or not supported by this CPU, which has " + known);
}

void rms_norm_fwd(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t h, uintptr_t rstd,
                  int64_t rows, int64_t cols, int64_t x_stride, int64_t residual_stride, double eps, double offset,
                  int x_dtype, int residual_dtype) {
  check_size(rows, "rows");
  check_size(cols, "cols");
  check_dtype(x_dtype, "x_dtype");
  if (residual) check_dtypes(x_dtype, "x_dtype", residual_dtype, "residual_dtype");
  const int64_t n = rows * cols;
  RmsNormFwd a{pointer(x, "x", n), pointer(residual, "residual", 0), pointer(weight, "weight", n), pointer(y, "y", n),
               pointer(h, "h", residual ? n : 0), pointer(rstd, "rstd", rows), rows, cols, x_stride, residual_stride,
               eps, offset, x_dtype, residual_dtype};
  py::gil_scoped_release no_gil;
  expect_output(a.y, n * bytes_of(x_dtype));
  if (a.h) expect_output(a.h, n * bytes_of(residual_dtype));
  PYLLM_CALL_CPU(isa, rms_norm_fwd, a);
}

void rms_norm_bwd(uintptr_t dy, uintptr_t dh, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx,
                  uintptr_t dweight, int64_t rows, int64_t cols, int64_t dy_stride, int64_t dh_stride, int64_t x_stride,
                  double offset, int dy_dtype, int x_dtype) {
  check_size(rows, "rows");
  check_size(cols, "cols");
  check_dtypes(dy_dtype, "dy_dtype", x_dtype, "x_dtype");
  const int64_t n = rows * cols;
  RmsNormBwd a{pointer(dy, "dy", n), pointer(dh, "dh", 0), pointer(x, "x", n), pointer(weight, "weight", n),
               pointer(rstd, "rstd", n), pointer(dx, "dx", n), pointer(dweight, "dweight", cols), rows, cols, dy_stride,
               dh_stride, x_stride, offset, dy_dtype, x_dtype};
  py::gil_scoped_release no_gil;
  expect_output(a.dx, n * bytes_of(x_dtype));
  PYLLM_CALL_CPU(isa, rms_norm_bwd, a);
}

void swiglu_fwd(uintptr_t gate, uintptr_t up, uintptr_t y, int64_t rows, int64_t cols, int64_t gate_stride,
                int64_t up_stride, int dtype) {
  check_size(rows, "rows");
  check_size(cols, "cols");
  check_dtype(dtype, "dtype");
  const int64_t n = rows * cols;
  SwigluFwd a{pointer(gate, "gate", n), pointer(up, "up", n), pointer(y, "y", n), rows, cols, gate_stride, up_stride,
              dtype};
  py::gil_scoped_release no_gil;
  expect_output(a.y, n * bytes_of(dtype));
  PYLLM_CALL_CPU(isa, swiglu_fwd, a);
}

void swiglu_bwd(uintptr_t dy, uintptr_t gate, uintptr_t up, uintptr_t dgate, uintptr_t dup, int64_t rows, int64_t cols,
                int64_t dy_stride, int64_t gate_stride, int64_t up_stride, int64_t dgate_stride, int64_t dup_stride,
                int dtype) {
  check_size(rows, "rows");
  check_size(cols, "cols");
  check_dtype(dtype, "dtype");
  const int64_t n = rows * cols;
  SwigluBwd a{pointer(dy, "dy", n), pointer(gate, "gate", n), pointer(up, "up", n), pointer(dgate, "dgate", n),
              pointer(dup, "dup", n), rows, cols, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, dtype};
  py::gil_scoped_release no_gil;
  const int64_t row = n > 0 ? bytes_of(dtype) * rows : 0;
  expect_output(a.dgate, row * dgate_stride);
  if (dgate_stride == cols) expect_output(a.dup, row * dup_stride);  // else one packed tensor, advised as dgate
  PYLLM_CALL_CPU(isa, swiglu_bwd, a);
}

}  // namespace
}  // namespace pyllm

PYBIND11_MODULE(_cpu, m) {
  using namespace pyllm;
  using py::arg;
  isa = pick_isa();
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  m.doc() = "Fused CPU kernels over raw pointers; sizes and strides in elements, dtype codes of kernels/extension.py.";
  m.attr("isa") = kIsaNames[int(isa)];
  m.def("set_serial_elements", [](int64_t n) { std::swap(serial_elements, n); return n; }, arg("elements"),
        "Elements from which on kernels use several threads, for tests; returns what it was.");
  m.def("rms_norm_fwd", &rms_norm_fwd, arg("x"), arg("residual"), arg("weight"), arg("y"), arg("h"), arg("rstd"),
        arg("rows"), arg("cols"), arg("x_stride"), arg("residual_stride"), arg("eps"), arg("offset"), arg("x_dtype"),
        arg("residual_dtype"));
  m.def("rms_norm_bwd", &rms_norm_bwd, arg("dy"), arg("dh"), arg("x"), arg("weight"), arg("rstd"), arg("dx"),
        arg("dweight"), arg("rows"), arg("cols"), arg("dy_stride"), arg("dh_stride"), arg("x_stride"), arg("offset"),
        arg("dy_dtype"), arg("x_dtype"));
  bind_rope(m);
  bind_loss(m);
  bind_decode(m);
  m.def("swiglu_fwd", &swiglu_fwd, arg("gate"), arg("up"), arg("y"), arg("rows"), arg("cols"), arg("gate_stride"),
        arg("up_stride"), arg("dtype"));
  m.def("swiglu_bwd", &swiglu_bwd, arg("dy"), arg("gate"), arg("up"), arg("dgate"), arg("dup"), arg("rows"),
        arg("cols"), arg("dy_stride"), arg("gate_stride"), arg("up_stride"), arg("dgate_stride"), arg("dup_stride"),
        arg("dtype"));
  bind_attention(m);
}
