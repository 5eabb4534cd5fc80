// CUDA C++ as the machine speaks it: what a kernel finds in NVIDIA's header of this name, as far as ours need it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../simt.h"

// ---- keywords ------------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define __shared__ static  // one block runs at a time, so a static variable is one per block

#define threadIdx (::simt::self->index)
#define blockIdx (::simt::self->block)
constexpr int warpSize = 32;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct longlong2 { long long x, y; };
struct longlong3 { long long x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

// ---- barriers and warp-wide instructions ---------------------------------------------------------------------------
inline void __syncthreads() { simt::block_sync(0); }
inline int __syncthreads_or(int vote) { return simt::block_sync(vote != 0) > 0; }
inline int __syncthreads_and(int vote) { return simt::block_sync(vote == 0) == 0; }
inline int __syncthreads_count(int vote) { return simt::block_sync(vote != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_sync(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = simt::self->lane;
  return simt::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = simt::self->lane, source = lane ^ lanes;
  return simt::shuffle(mask, value, source / width > lane / width ? lane : source, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = simt::self->lane, source = lane + delta;
  return simt::shuffle(mask, value, source / width != lane / width ? lane : source, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = simt::self->lane, source = lane - delta;
  return simt::shuffle(mask, value, source < 0 || source / width != lane / width ? lane : source, "__shfl_up_sync");
}
SIMT_UNSEEN inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int vote = predicate != 0;
  const unsigned char* slots = simt::warp_exchange(mask, &vote, sizeof vote, "__ballot_sync");
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) votes |= unsigned(slots[lane * simt::kSlot] != 0) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- atomics -------------------------------------------------------------------------------------------------------
namespace simt {
template <class T, class Update>
SIMT_UNSEEN T atomic(T* p, void* pc, Update update) {
  atomic_access(p, sizeof(T), pc);
  const T old = *p;
  *p = update(old);
  return old;
}
}  // namespace simt
template <class T>
SIMT_UNSEEN T atomicAdd(T* p, T v) { return simt::atomic(p, SIMT_CALLER, [=](T old) { return old + v; }); }
template <class T>
SIMT_UNSEEN T atomicMax(T* p, T v) { return simt::atomic(p, SIMT_CALLER, [=](T old) { return std::max(old, v); }); }
template <class T>
SIMT_UNSEEN T atomicExch(T* p, T v) { return simt::atomic(p, SIMT_CALLER, [=](T) { return v; }); }
template <class T>
SIMT_UNSEEN T atomicCAS(T* p, T expected, T v) {
  return simt::atomic(p, SIMT_CALLER, [=](T old) { return old == expected ? v : old; });
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------
using std::max;
using std::min;
template <class T>
T __ldg(const T* p) { return *p; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace simt {
template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace simt
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }

// ---- the runtime ---------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) { return cudaSuccess; }

// Runs at once. What the checker finds is thrown.
template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  auto call = [&] { kernel(arguments...); };
  simt::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
            [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call, reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}
