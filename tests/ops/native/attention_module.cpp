// Attention's sources as a module of their own, in one instruction set, for test_cpu_attention_bugs.py.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "attention/attention_cpu.h"
#include "bind_cpu.h"

namespace pyllm {

size_t largest_scratch = 0;

void* scratch(size_t bytes) {
  largest_scratch = std::max(largest_scratch, bytes);
  thread_local void* data = nullptr;
  std::free(data);
  const size_t size = (bytes + 63) / 64 * 64;
  data = std::aligned_alloc(64, size ? size : 64);
  if (data) std::memset(data, 0xff, size);  // NaN in every type: what is read before it is written shows
  return data;
}
void expect_output(void*, int64_t) {}
int max_threads() { return omp_get_max_threads(); }

#define PYLLM_ABSENT(isa)                                   \
  namespace isa {                                           \
  void attention_fwd(const AttentionFwd&) { std::abort(); } \
  void attention_few(const AttentionFwd&) { std::abort(); } \
  void attention_bwd(const AttentionBwd&) { std::abort(); } \
  }
#if defined(__AVX2__)
Isa isa = Isa::avx2;
PYLLM_ABSENT(base)
PYLLM_ABSENT(avx512)
#else
Isa isa = Isa::base;
#if PYLLM_X86
PYLLM_ABSENT(avx2)
PYLLM_ABSENT(avx512)
#endif
#endif

}  // namespace pyllm

PYBIND11_MODULE(attention_module, m) {
  pyllm::bind_attention(m);
  m.def("largest_scratch", [] { return pyllm::largest_scratch; }, "bytes");
}
