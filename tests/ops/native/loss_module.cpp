// The loss's kernels alone, in one instruction set, as a module for trials: whichever is asked for, avx2 answers.
// Scratch memory is NaN whenever it is handed out, so that what a kernel reads before it writes shows.
#include <omp.h>
#include <stdlib.h>

#include <new>

#include "bind_cpu.h"
#include "cross_entropy/cross_entropy_cpu.h"
#include "linear/linear_cpu.h"

namespace pyllm {

Isa isa = Isa::avx2;

void* scratch(size_t bytes) {
  static thread_local float* memory = nullptr;
  free(memory);
  const size_t size = (bytes + 63) / 64 * 64;
  memory = static_cast<float*>(aligned_alloc(64, size ? size : 64));
  if (!memory) throw std::bad_alloc();
  for (size_t i = 0; i < size / 4; i++) memory[i] = __builtin_nanf("");
  return memory;
}

void expect_output(void*, int64_t) {}
int max_threads() { return omp_get_max_threads(); }

#define ANSWERED_BY_AVX2(name, Args)                    \
  namespace base { void name(Args a) { avx2::name(a); } } \
  namespace avx512 { void name(Args a) { avx2::name(a); } }
ANSWERED_BY_AVX2(cross_entropy_fwd, const CrossEntropy&)
ANSWERED_BY_AVX2(cross_entropy_bwd, const CrossEntropy&)
ANSWERED_BY_AVX2(cross_entropy_step, const CrossEntropy&)
ANSWERED_BY_AVX2(gemm, const Gemm&)
ANSWERED_BY_AVX2(column_sums, const ColumnSums&)

}  // namespace pyllm

PYBIND11_MODULE(_loss, m) {
  m.attr("isa") = "avx2";
  pyllm::serial_elements = 0;  // small cases take several threads, too
  pyllm::bind_loss(m);
}
