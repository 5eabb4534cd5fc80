// The page of device primitives that every kernel stands on: element types, vectors of them, sums over threads.
//
// nvcc compiles it for GPUs. g++ compiles the same kernels for the SIMT machine in tests/simt, which brings its own
// cuda_runtime.h and runs every CUDA thread on the CPU under a memory checker.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace pyllm {

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- element types: stored narrow, computed in float, rounded once (to nearest, ties to even) ----------------------
// Half-precision elements travel two to a 32-bit register: unpack gives one of them (0: the low 16 bits), pack rounds
// and joins two. A float fills a register: `half` and `hi` are then ignored.
template <class T>
__device__ __forceinline__ float unpack(uint32_t word, int half);
template <>
__device__ __forceinline__ float unpack<float>(uint32_t word, int) { return __uint_as_float(word); }
template <>
__device__ __forceinline__ float unpack<bf16>(uint32_t word, int half) {
  return __uint_as_float(half ? word & 0xffff0000u : word << 16);  // bf16 is the upper half of a float
}
template <>
__device__ __forceinline__ float unpack<f16>(uint32_t word, int half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * half)));
}

template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack<float>(float lo, float) { return __float_as_uint(lo); }
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}

// ---- vectors -------------------------------------------------------------------------------------------------------
constexpr int kVectorBytes = 16;  // the widest load or store of one thread, on every architecture we build for

// How many elements of each of these types a thread moves at a time, so that the widest of them fills 16 bytes. With
// one count for all streams, neighbouring threads touch neighbouring memory in each of them: no half-used sectors.
template <class... T>
constexpr int vector_length() {
  int widest = 1;
  for (int bytes : {int(sizeof(T))...}) widest = bytes > widest ? bytes : widest;
  return kVectorBytes / widest;
}

// N neighbouring elements, moved by one instruction of at most 16 bytes; their address is a multiple of their size.
// They stay packed as they came: 8 halves take 4 registers.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static constexpr int kBytes = sizeof(T) * N;
  static_assert(kBytes <= kVectorBytes, "one instruction moves 16 bytes at most");
  using Word = std::conditional_t<kBytes >= 4, uint32_t, uint16_t>;
  static constexpr int kWords = kBytes / sizeof(Word), kPerWord = N / kWords;
  Word word[kWords];

  // nvcc turns a copy of the whole struct into one instruction. g++ would split it, and the checker must see one
  // access, so the machine is told of it.
#if defined(__CUDACC__)
  static __device__ __forceinline__ Vec load(const T* p) { return *reinterpret_cast<const Vec*>(p); }
  // To global memory. Where branches lead to it nvcc splits the store of a struct, or of a uint4, into its words; not
  // so CUDA's own st.global.wb, which is what a plain store means.
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kBytes == 16) __stwb(reinterpret_cast<uint4*>(p), make_uint4(word[0], word[1], word[2], word[3]));
    else if constexpr (kBytes == 8) __stwb(reinterpret_cast<uint2*>(p), make_uint2(word[0], word[1]));
    else *reinterpret_cast<Vec*>(p) = *this;
  }
#else
  SIMT_UNSEEN static Vec load(const T* p) { return simt::load<Vec>(p, SIMT_CALLER); }
  SIMT_UNSEEN void store(T* p) const { simt::store(p, *this, SIMT_CALLER); }
#endif

  // Zeros when there is nothing to load: sums may then run over all of them unasked.
  static __device__ __forceinline__ Vec load_if(bool there, const T* p) {
    Vec zeros = {};
    return there ? load(p) : zeros;
  }

  // Makes the compiler forget that it has unpacked this vector before, so that a vector kept for later is kept packed:
  // without it, ptxas likes to hold the unpacked floats, twice the registers, and spills.
  __device__ __forceinline__ void stay_packed() {
#if defined(__CUDACC__)
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      if constexpr (kBytes >= 4) asm volatile("" : "+r"(word[i]));
      else asm volatile("" : "+h"(word[i]));
    }
#endif
  }

  // Element j in float; all elements from floats, rounded.
  __device__ __forceinline__ float operator[](int j) const { return unpack<T>(word[j / kPerWord], j % kPerWord); }
  static __device__ __forceinline__ Vec round(const float (&x)[N]) {
    Vec out;
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      const float lo = x[i * kPerWord], hi = kPerWord > 1 ? x[i * kPerWord + kPerWord - 1] : 0.f;
      out.word[i] = static_cast<Word>(pack<T>(lo, hi));
    }
    return out;
  }
};

// Do rows of this tensor begin where a vector of N elements may? Its first address and its row stride decide. Whether
// rows are made of whole vectors is for the caller to see to.
template <class T, int N>
inline bool vectors_fit(const T* first, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(first) % (sizeof(T) * N) == 0 && row_stride % N == 0;
}

// ---- sums over threads ---------------------------------------------------------------------------------------------
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over groups of `width` neighbouring lanes, width a power of two <= 32. Every lane gets its group's sum.
// All 32 lanes must call it together, those with nothing to add as well.
__device__ __forceinline__ float warp_sum(float x, int width = kWarp) {
  for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sum over the block, for blocks of 2 to 32 whole warps; all threads must call it, all get the sum.
//
// `turn` must alternate between successive calls. The hazard: a fast warp may come to the next call and overwrite the
// partial sums while a slow one still reads those of this call. One more barrier would prevent that; two buffers in
// turn do it for free, since whoever is about to reuse a buffer has passed the barrier of the call in between, and so
// has everyone, having read this one's sums before.
__device__ __forceinline__ float block_sum(float x, int turn = 0) {
  __shared__ float partial[2][kWarp];
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
  const int lane = thread % kWarp, warp = thread / kWarp, warps = blockDim.x * blockDim.y / kWarp;
  x = warp_sum(x);
  if (lane == 0) partial[turn & 1][warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[turn & 1][lane] : 0.f);
}

}  // namespace pyllm
