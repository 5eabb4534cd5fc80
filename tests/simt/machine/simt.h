// A functional SIMT machine: runs CUDA kernels on the CPU, one fiber per CUDA thread, so that they can be tested where
// there is no GPU. This header is what the emulated CUDA headers (cuda/) and the kernels' own wrappers of PTX
// instructions are made of; control.h is what tests see.
//
// One operating-system thread runs one block at a time, and of it one thread at a time, until that meets a barrier or a
// warp-wide instruction. Kernels are compiled with -fsanitize=thread, and checker.cpp answers the calls which that puts
// before every memory access.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define SIMT_CALLER __builtin_return_address(0)
// For functions that access memory in a kernel's place: they tell the checker themselves, naming their caller.
#define SIMT_UNSEEN __attribute__((no_sanitize("thread"), noinline))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 gridDim, blockDim;

namespace simt {

struct Thread {  // one CUDA thread
  uint3 index, block;
  int linear, warp, lane;
};
extern Thread* self;  // the running one; null in host code

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- launching -----------------------------------------------------------------------------------------------------
using Body = void (*)(void* arguments);
void run(dim3 grid, dim3 block, size_t dynamic_shared, Body body, void* arguments, const void* kernel);
unsigned char* dynamic_shared();

// ---- meeting points ------------------------------------------------------------------------------------------------
constexpr size_t kSlot = 64;  // bytes that a lane can bring to a warp-wide instruction

// Every lane in `mask` comes with its value to the same `site`. The last one to arrive passes the 32 slots through
// `combine`; all of them then get the slots to read.
const unsigned char* warp_exchange(unsigned mask, const void* value, size_t bytes, const char* site,
                                   void (*combine)(unsigned char* slots) = nullptr);
void warp_sync(unsigned mask);                         // __syncwarp: also orders memory
int block_sync(int vote);                              // all threads of the block; sum of the votes
void named_barrier(int number, int count, bool waits); // bar.sync or bar.arrive of `count` threads
void warpgroup_sync(const char* site);                 // four warps, as wgmma has it: orders no memory

template <class T>
SIMT_UNSEEN T shuffle(unsigned mask, T value, int source, const char* site) {
  static_assert(sizeof(T) <= kSlot && std::is_trivially_copyable<T>::value, "");
  const unsigned char* slots = warp_exchange(mask, &value, sizeof(T), site);
  if (!(mask >> source & 1)) fail("%s: lane %d reads lane %d, not in mask %08x", site, self->lane, source, mask);
  T out;
  std::memcpy(&out, slots + source * kSlot, sizeof(T));
  return out;
}

// ---- memory, as the checker is told of it --------------------------------------------------------------------------
void vector_access(const void* p, size_t bytes, bool write, void* pc);  // one aligned load or store
void atomic_access(const void* p, size_t bytes, void* pc);

template <class V>
SIMT_UNSEEN V load(const void* p, void* pc) {
  vector_access(p, sizeof(V), false, pc);
  V out;
  std::memcpy(&out, p, sizeof(V));
  return out;
}
template <class V>
SIMT_UNSEEN void store(void* p, const V& value, void* pc) {
  vector_access(p, sizeof(V), true, pc);
  std::memcpy(p, &value, sizeof(V));
}

// ---- asynchronous copies (async.cpp) -------------------------------------------------------------------------------
void cp_async(void* dst, const void* src, int bytes, int source_bytes, void* pc);  // the rest is filled with zeros
void cp_async_commit();
void cp_async_wait(int pending);

void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier, int expect_bytes);
void mbarrier_wait(uint64_t* barrier, int parity);
void bulk_copy(uint64_t* barrier, void* dst, const void* src, int bytes, int source_bytes, void* pc);

// ---- products of a warpgroup (async.cpp): what they read and add is settled when they are waited for -----------------
using Decode = float (*)(uint16_t bits);
void wgmma_fence();
void wgmma_read(const void* p, size_t bytes, void* pc);  // operand of a wgmma that is not yet waited for
void wgmma(float* d, const uint32_t* a, uintptr_t a_tile, uintptr_t b_tile, int b_panel, int n, bool add, bool columns,
           Decode decode, void* pc);
void wgmma_commit();
void wgmma_wait(int pending);
void fence_proxy_async();  // this thread's stores may be read by wgmma

}  // namespace simt
