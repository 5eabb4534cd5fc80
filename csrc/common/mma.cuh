// Tensor cores, asynchronous copies and the shared-memory tiles that both work on. The PTX of the package is here, each
// instruction beside what the CPU's SIMT machine does in its place (tests/simt/machine). sm_80 and later have them all.
//
// One warp multiplies 16 rows by 8 columns at a time, kDepth<T> deep: mma.sync. With g = lane / 4 and t = lane % 4 a
// lane holds, of halves (m16n8k16):
//
//   a[0] row g, columns 2t, 2t+1   a[2] the same row, 8 columns on      b0 column g, rows 2t, 2t+1    d[0] row g, column 2t
//   a[1] row g + 8, the same       a[3] row g + 8, 8 columns on         b1 column g, 8 rows on        d[1] row g, column 2t+1
//                                                                                                     d[2], d[3] row g + 8
// and of floats (m16n8k8, TF32):
//
//   a[0] row g, column t           a[2] row g, column t + 4             b0 column g, row t            d as above
//   a[1] row g + 8, column t       a[3] row g + 8, column t + 4         b1 column g, row t + 4
//
// Either way a step along the depth is 32 bytes of every row, and the same loads serve both.
#pragma once
#include "common/device.cuh"

#if defined(__CUDACC__)
#define PYLLM_PRIMITIVE __device__ __forceinline__
#define SHARED_DYNAMIC(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "tensor_core.h"
#define PYLLM_PRIMITIVE SIMT_UNSEEN inline  // one call, one access in the checker's eyes
#define SHARED_DYNAMIC(name) unsigned char* const name = simt::dynamic_shared()
#endif

namespace pyllm {

// ---- arithmetic ----------------------------------------------------------------------------------------------------
// 2^x to 2 ulp; 0 for -inf.
PYLLM_PRIMITIVE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// e^x, for x whose rounding is small: scores less their maximum.
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }

// The larger one; NaN where either is, which fmaxf would drop. One instruction.
PYLLM_PRIMITIVE float max_nan(float x, float y) {
#if defined(__CUDACC__)
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
  return most;
#else
  return x > y || x != x ? x : y;
#endif
}

// The nearest float with TF32's 10 bits of mantissa.
PYLLM_PRIMITIVE uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return (__float_as_uint(x) + 0x1000) & 0xffffe000u;
#endif
}

// ---- copies from global to shared memory that run while the thread goes on -----------------------------------------
// 16 bytes, both addresses multiples of 16; zeros where there is nothing to read. Visible to the thread after
// cp_async_wait, to others after a barrier behind it.
PYLLM_PRIMITIVE void cp_async16(void* shared, const void* global, bool there) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global), "r"(there ? 16 : 0) : "memory");
#else
  simt::cp_async(shared, global, 16, there ? 16 : 0, SIMT_CALLER);
#endif
}
// All copies since the last commit become a group.
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit();
#endif
}
// Until at most kPending of the newest groups are still on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
#else
  simt::cp_async_wait(kPending);
#endif
}

// ---- 8x8 matrices of 16 bits from shared memory --------------------------------------------------------------------
// Lane i names row i % 8, 16 bytes long, of matrix i / 8. Of matrix n a lane gets, in out[n], elements 2t and 2t + 1 of
// row g (transposed: of column g). Of floats, of which a row has four: element t of row g.
template <bool kTransposed>
PYLLM_PRIMITIVE void ldmatrix(uint32_t (&out)[4], const void* row) {
#if defined(__CUDACC__)
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
#else
  simt::ldmatrix_x4<kTransposed>(out, row, SIMT_CALLER);
#endif
}

// ---- d += a b on tensor cores --------------------------------------------------------------------------------------
template <class T>
constexpr int kDepth = 32 / sizeof(T);  // of one mma: 16 halves, 8 floats

#if !defined(__CUDACC__)
template <class T>
float decode_bits(uint16_t bits) { return unpack<T>(bits, 0); }
#endif

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  simt::mma_m16n8k16<decode_bits<T>>(d, a, b0, b1);
#endif
}

__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  simt::mma_m16n8k8_tf32(d, a, b0, b1);
#endif
}

// Floats in three TF32 products: x is its nearest TF32 plus a rest, and all but rest times rest is added up. The error
// is that of float32 arithmetic, 2^-21 of a product at most, where TF32 alone would leave 2^-10. The sum of these few is
// added to d outside of the tensor core, which cuts off what doesn't fit an accumulator: seen on an H100, a gradient of
// 2000 terms was off by 7 times what float32's roundings make.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& big, uint32_t& rest) {
  big = to_tf32(__uint_as_float(x));
  rest = to_tf32(__uint_as_float(x) - __uint_as_float(big));
}
template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t big[4], rest[4], big0, big1, rest0, rest1;
#pragma unroll
  for (int i = 0; i < 4; i++) split_tf32(a[i], big[i], rest[i]);
  split_tf32(b0, big0, rest0);
  split_tf32(b1, big1, rest1);
  float sum[4] = {};
  mma_tf32(sum, rest, big0, big1);
  mma_tf32(sum, big, rest0, rest1);
  mma_tf32(sum, big, big0, big1);
#pragma unroll
  for (int i = 0; i < 4; i++) d[i] += sum[i];
}

// ---- tiles in shared memory ----------------------------------------------------------------------------------------
// Rows of kCols elements, a multiple of 64 bytes. The 16-byte chunks of a row are permuted by its number, so that one
// chunk of eight rows below each other lies in all 32 banks: matrices are then read, and rows written, without conflict.
template <class T, int kCols>
struct Tile {
  static constexpr int kPerChunk = 16 / sizeof(T), kChunks = kCols / kPerChunk;
  static_assert(kChunks % 4 == 0, "rows are multiples of 64 bytes");
  static constexpr int bytes(int rows) { return rows * kCols * int(sizeof(T)); }

  unsigned char* first;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    // Rows of an odd number of 64 bytes alternate between the halves of the banks by themselves.
    const int place = kChunks % 8 == 0 ? c ^ (row & 7) : c ^ (row >> 1 & 3);
    return reinterpret_cast<T*>(first + (row * kChunks + place) * 16);
  }
  __device__ __forceinline__ T* element(int row, int col) const {
    return chunk(row, col / kPerChunk) + col % kPerChunk;
  }
};

// Operand a: 16 rows from `row` on, the step-th 32 bytes of each.
template <class T, int kCols>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile<T, kCols>& tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix<false>(a, tile.chunk(row + lane % 16, 2 * step + lane / 16));
}

// Operand b of the product with a tile's transpose: its 16 rows from `row` on are the columns of two mma, b[0] and b[1]
// of the first, b[2] and b[3] of the second.
template <class T, int kCols>
__device__ __forceinline__ void load_b_rows(uint32_t (&b)[4], const Tile<T, kCols>& tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix<false>(b, tile.chunk(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}

// Operand b of the product with the tile itself: kDepth rows from `row` on, of the 16 columns from `col` on.
template <class T, int kCols>
__device__ __forceinline__ void load_b_columns(uint32_t (&b)[4], const Tile<T, kCols>& tile, int row, int col) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 2) {
    ldmatrix<true>(b, tile.chunk(row + lane % 16, col / 8 + lane / 16));
  } else {
    // ldmatrix transposes 16-bit elements only. Rows 2t and 2t + 1 in place of t and t + 4: a_of_products has the same
    // order, and four such rows lie in different banks.
#pragma unroll
    for (int i = 0; i < 4; i++)
      b[i] = __float_as_uint(*tile.element(row + 2 * (lane % 4) + i % 2, col + 8 * (i / 2) + lane / 4));
  }
}

// Results of a product as operand a of the next one: columns kDepth * step and on, rounded to T. Each lane has just the
// elements that it needs (of floats in load_b_columns' order).
template <class T, int N>
__device__ __forceinline__ void a_of_products(uint32_t (&a)[4], const float (&d)[N][4], int step) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack<T>(d[2 * step + i / 2][i % 2 * 2], d[2 * step + i / 2][i % 2 * 2 + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = __float_as_uint(d[step][i % 2 * 2 + i / 2]);
  }
}

}  // namespace pyllm
