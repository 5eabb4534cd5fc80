// What every CPU kernel shares and no instruction set changes: dtypes, how a kernel is declared once per instruction
// set and called through one name, scratch memory, the parallel loop.
//
// Each <op>_cpu.cpp is compiled several times, with other compiler flags and another -DPYLLM_ISA=..., into
//   pyllm::base     whatever every CPU of this architecture has (SSE2 on x86-64, NEON on aarch64)
//   pyllm::avx2     256-bit vectors, fused multiply-add, hardware half conversion     (x86-64 only)
//   pyllm::avx512   512-bit vectors with masks                                        (x86-64 only)
// and bind_cpu.cpp, which is compiled once, picks a namespace when the module is imported.
//
// The one danger is an inline function or template that two of these copies share: the linker keeps *one* of them, and
// if it keeps the AVX-512 one the base kernels crash on older CPUs. Therefore kernel files use no standard library
// templates, and everything in headers that contains code has internal linkage (unnamed namespaces).
#pragma once
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#include "dtype.h"

#if defined(__x86_64__)
#define PYLLM_X86 1
#else
#define PYLLM_X86 0
#endif

namespace pyllm {

// dtype codes as plain integers, which is what Python sends; float64 is the CPU's own.
constexpr int kFloat32 = int(DType::kFloat32), kBFloat16 = int(DType::kBFloat16), kFloat16 = int(DType::kFloat16);
constexpr int kFloat64 = 3;

// Storage only; arithmetic happens in float vectors (simd.h).
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// PYLLM_DECLARE_CPU(swiglu_fwd, const SwigluFwd&) declares base::swiglu_fwd, avx2::swiglu_fwd, avx512::swiglu_fwd;
// PYLLM_CALL_CPU(swiglu_fwd, args) calls the one of the instruction set in use.
enum class Isa { base, avx2, avx512 };
#if PYLLM_X86
#define PYLLM_DECLARE_CPU(name, Args)  \
  namespace base { void name(Args); }  \
  namespace avx2 { void name(Args); }  \
  namespace avx512 { void name(Args); }
#define PYLLM_CALL_CPU(isa, name, args)                      \
  ((isa) == ::pyllm::Isa::avx512 ? ::pyllm::avx512::name(args) \
   : (isa) == ::pyllm::Isa::avx2 ? ::pyllm::avx2::name(args)   \
                                 : ::pyllm::base::name(args))
#else
#define PYLLM_DECLARE_CPU(name, Args) \
  namespace base { void name(Args); }
#define PYLLM_CALL_CPU(isa, name, args) ((void)(isa), ::pyllm::base::name(args))
#endif

// At least `bytes` of 64-byte aligned memory that stays valid until the calling thread asks again. It is kept between
// calls: fresh pages from the operating system cost more than many kernels. Defined in bind_cpu.cpp.
void* scratch(size_t bytes);

// Tells the operating system that `bytes` of output are about to be written. Beyond the size up to which malloc keeps
// freed memory (32 MiB in glibc) every output comes as fresh pages, and with pages of 4 KiB the page faults take longer
// than the kernel: with pages of 2 MiB SwiGLU on (2048, 5632) float32 runs 2.5 times as fast. Defined in bind_cpu.cpp.
void expect_output(void* p, int64_t bytes);

// Below this many elements a second thread costs more (waking it, about 5 us) than it saves.
constexpr int64_t kSerialElements = 32768;
inline int64_t serial_elements = kSerialElements;  // that number; tests lower it: small inputs take several threads, too

// OpenMP's number of threads. 1 in a process that was forked: the parent's threads are not there, but its OpenMP runtime
// (GCC's, at least) does not know and waits for them for ever. Defined in bind_cpu.cpp.
int max_threads();

namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Threads that parallel_for() below uses.
inline int threads_for(int64_t items, int64_t elements) {
  return elements < serial_elements ? 1 : int(max64(1, min64(items, max_threads())));
}

// body(begin, end, thread) on contiguous slices of [0, items), one per thread. `elements` is the work they stand for.
// The OpenMP runtime is the one that torch loaded, so torch.set_num_threads() governs this as well.
template <class Body>
inline void parallel_for(int64_t items, int64_t elements, const Body& body) {
  const int threads = threads_for(items, elements);
  if (threads == 1) {
    body(int64_t(0), items, 0);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int t = 0; t < threads; t++) {
    const int64_t share = items / threads, extra = items % threads;
    const int64_t begin = t * share + min64(t, extra);
    body(begin, begin + share + (t < extra), t);
  }
}

}  // namespace
}  // namespace pyllm
