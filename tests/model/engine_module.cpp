// The decoding engine's sources as a module of their own, in one instruction set, for test_engine_bugs.py.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "bind_cpu.h"
#include "decode/decode_cpu.h"

namespace pyllm {

void* scratch(size_t bytes) {
  thread_local void* data = nullptr;
  std::free(data);
  return data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
}
void expect_output(void*, int64_t) {}
int max_threads() { return omp_get_max_threads(); }

#define PYLLM_ABSENT(isa)                                  \
  namespace isa {                                          \
  void decode_step(const DecodeStep&) { std::abort(); }    \
  void packed_linear(const PackedLinear&) { std::abort(); } \
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

PYBIND11_MODULE(engine_module, m) { pyllm::bind_decode(m); }
