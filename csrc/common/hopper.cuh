// What sm_90a has beyond mma.cuh: copies of whole boxes of a tensor (TMA), barriers in shared memory that count threads
// and bytes (mbarrier), and products of four warps together, whose operands lie in shared memory and which run while the
// warps go on (wgmma). As in mma.cuh, each instruction stands beside what the CPU's SIMT machine does in its place.
//
// A tile in shared memory is made of panels, 64 columns of 2 bytes wide: rows of 128 bytes, one below the other. TMA
// writes and wgmma reads them with the 128-byte swizzle: of an address, bits 4 to 6 are xored with bits 7 to 9, so the
// eight 16-byte chunks of a row are permuted by the row's number. Panels begin at multiples of 1024 bytes.
#pragma once
#include "common/mma.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

namespace pyllm {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kPanelColumns = 64, kPanelRow = 128;  // elements, bytes
constexpr int kPanelAlignment = 1024;

// ---- registers -----------------------------------------------------------------------------------------------------
// Of each thread of the warpgroup, from here on: those that copy give some to those that multiply. A block's pool is what
// its threads start with, which __launch_bounds__ decides; whoever takes waits until there is enough in it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kRegisters));
#endif
}

// ---- barriers of some of the block's threads -----------------------------------------------------------------------
// Number 0 is __syncthreads'. `threads` come, in all: some wait for the others, some only say that they were here.
__device__ __forceinline__ void named_barrier_wait(int number, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
#else
  simt::named_barrier(number, threads, true);
#endif
}
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(threads) : "memory");
#else
  simt::named_barrier(number, threads, false);
#endif
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------
// Goes through phases 0, 1, 2, ...: one ends when `count` arrivals have come and all bytes they announced are there.
struct Mbarrier {
  uint64_t* at;

#if defined(__CUDACC__)
  __device__ __forceinline__ uint32_t address() const { return uint32_t(__cvta_generic_to_shared(at)); }
#endif
  __device__ __forceinline__ void init(int count) const {
#if defined(__CUDACC__)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address()), "r"(count) : "memory");
#else
    simt::mbarrier_init(at, count);
#endif
  }
  __device__ __forceinline__ void arrive() const {
#if defined(__CUDACC__)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address()) : "memory");
#else
    simt::mbarrier_arrive(at, 0);
#endif
  }
  // And that so many bytes will come by copies that name this barrier.
  __device__ __forceinline__ void arrive_expecting(int bytes) const {
#if defined(__CUDACC__)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address()), "r"(bytes) : "memory");
#else
    simt::mbarrier_arrive(at, bytes);
#endif
  }
  // Until the newest phase of this parity has ended. Before the first phase has, one of parity 1 counts as ended.
  __device__ __forceinline__ void wait(int parity) const {
#if defined(__CUDACC__)
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra ENDED;\n"
        "bra AGAIN;\n"
        "ENDED:\n"
        "}" :: "r"(address()), "r"(parity) : "memory");
#else
    simt::mbarrier_wait(at, parity);
#endif
  }
};
// After the inits, before the barrier behind which others use them.
__device__ __forceinline__ void mbarriers_are_ready() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// What this thread has written to shared memory by plain stores may be read by wgmma, once a barrier lies between.
__device__ __forceinline__ void stores_are_for_wgmma() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  simt::fence_proxy_async();
#endif
}

// ---- boxes of a tensor ---------------------------------------------------------------------------------------------
// A tensor (batch, row, head, column) of 2-byte elements with dense columns, read in boxes of one batch, one head,
// `box_rows` rows and 64 columns. What a box covers beyond the tensor's edge is zeros.
struct BoxedTensor {
  const void* first;
  int64_t columns, heads, rows, batches;
  int64_t head_stride, row_stride, batch_stride;  // in elements
  int box_rows;
};

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;

// Asks the driver, which alone knows the format. A CUDA error code.
inline int encode(TensorMap* map, const BoxedTensor& x) {
  static const auto encode_tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(error == cudaSuccess ? found : nullptr);
  }();
  if (!encode_tiled) return int(cudaErrorNotSupported);
  const cuuint64_t size[4] = {cuuint64_t(x.columns), cuuint64_t(x.heads), cuuint64_t(x.rows), cuuint64_t(x.batches)};
  // Of a dimension of one the stride is never used; the driver wants a good one nevertheless.
  auto bytes = [](int64_t n, int64_t stride) { return cuuint64_t(n > 1 ? 2 * stride : 16); };
  const cuuint64_t stride[3] = {bytes(x.heads, x.head_stride), bytes(x.rows, x.row_stride),
                                bytes(x.batches, x.batch_stride)};
  const cuuint32_t box[4] = {kPanelColumns, 1, cuuint32_t(x.box_rows), 1}, step[4] = {1, 1, 1, 1};
  // Either 16-bit type would do: nothing is computed, and zeros are zeros.
  const CUresult result = encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(x.first), size, stride,
                                       box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}
#else
struct TensorMap : simt::Boxes {};

inline int encode(TensorMap* map, const BoxedTensor& x) {
  auto bytes = [](int64_t n, int64_t stride) { return n > 1 ? 2 * stride : 16; };
  static_cast<simt::Boxes&>(*map) = {static_cast<const unsigned char*>(x.first),
                                     {x.columns, x.heads, x.rows, x.batches},
                                     {2, bytes(x.heads, x.head_stride), bytes(x.rows, x.row_stride),
                                      bytes(x.batches, x.batch_stride)},
                                     x.box_rows};
  return simt::boxes_fit(*map) ? 0 : int(cudaErrorInvalidValue);
}
#endif

// One box into a panel; one thread does it for all. The barrier, which was told of its bytes, says when it is there.
PYLLM_PRIMITIVE void fetch_box(void* panel, const TensorMap& map, const Mbarrier& barrier, int column, int head, int row,
                               int batch) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" :: "r"(uint32_t(__cvta_generic_to_shared(panel))), "l"(&map), "r"(barrier.address()), "r"(column),
      "r"(head), "r"(row), "r"(batch) : "memory");
#else
  const int64_t at[4] = {column, head, row, batch};
  simt::fetch_box(panel, map, barrier.at, at, SIMT_CALLER);
#endif
}

// ---- d += a b by a warpgroup ---------------------------------------------------------------------------------------
// d has 64 rows, 16 a warp, in each warp as by mma (mma.cuh): d[n] is d of columns 8n and on. The depth is 16.
//
// Everything between `wgmma_begin` and `wgmma_commit` is a group. Until `wgmma_wait` has seen it end, its operands in
// shared memory must not be written, nor d and a in registers be touched.
struct PanelOperand {
#if defined(__CUDACC__)
  uint64_t bits;
#else
  uintptr_t address;
  int panel_bytes;
#endif
};
// `a`, or `b` transposed: panels' rows are its rows. Depth 16 step and on, of panels so many bytes apart.
__device__ __forceinline__ PanelOperand operand_of_rows(const unsigned char* first, int panel_bytes, int step) {
  const unsigned char* at = first + step / 4 * panel_bytes + step % 4 * 32;
#if defined(__CUDACC__)
  // In units of 16 bytes: where it is, (unused with this swizzle: 1), 1024 from eight rows to the next eight.
  const uint64_t address = uint32_t(__cvta_generic_to_shared(at)) >> 4 & 0x3fff;
  return {address | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62};
#else
  return {reinterpret_cast<uintptr_t>(at), 0};
#endif
}
// `b`: panels' rows are its depth, rows 16 step and on.
__device__ __forceinline__ PanelOperand operand_of_columns(const unsigned char* first, int panel_bytes, int step) {
  const unsigned char* at = first + step * 16 * kPanelRow;
#if defined(__CUDACC__)
  // The same units: where it is, from 64 columns to the next 64, and 1024 from eight rows to the next eight.
  const uint64_t address = uint32_t(__cvta_generic_to_shared(at)) >> 4 & 0x3fff;
  return {address | uint64_t(panel_bytes >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62};
#else
  return {reinterpret_cast<uintptr_t>(at), panel_bytes};
#endif
}

// The compiler must not move what touches these registers across what stands around it.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[n][i]) :: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&a)[N][4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[n][i]) :: "memory");
#endif
}

__device__ __forceinline__ void wgmma_begin() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence();
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit();
#endif
}
// Until at most kPending of the newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kPending) : "memory");
#else
  simt::wgmma_wait(kPending);
#endif
}

// The registers of d in an asm statement: 32 or 64, and what PTX calls them.
#define PYLLM_D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PYLLM_D16(n) PYLLM_D4(n), PYLLM_D4(n + 1), PYLLM_D4(n + 2), PYLLM_D4(n + 3)
#define PYLLM_D32 PYLLM_D16(0), PYLLM_D16(4)
#define PYLLM_D64 PYLLM_D32, PYLLM_D16(8), PYLLM_D16(12)
#define PYLLM_FIRST_32                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PYLLM_SECOND_32                                                                                              \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "   \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYLLM_WGMMA(shape, type) "wgmma.mma_async.sync.aligned.m64n" shape "k16.f32." type "." type " "

// a and b both of rows; without `add`, d is set.
#define PYLLM_WGMMA_ROWS(shape, type, registers, list, a_at, b_at, add_at)                                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\n" PYLLM_WGMMA(shape, type)                     \
               "{" list "}, %" a_at ", %" b_at ", add, 1, 1, 0, 0;\n}"                                               \
               : registers : "l"(a.bits), "l"(b.bits), "r"(int(add)))
template <class T, int N>
PYLLM_PRIMITIVE void wgmma_rows(float (&d)[N][4], PanelOperand a, PanelOperand b, bool add) {
  static_assert(N == 8 || N == 16, "64 or 128 columns");
#if defined(__CUDACC__)
  if constexpr (N == 8 && std::is_same_v<T, bf16>)
    PYLLM_WGMMA_ROWS("64", "bf16", PYLLM_D32, PYLLM_FIRST_32, "32", "33", "34");
  else if constexpr (N == 8)
    PYLLM_WGMMA_ROWS("64", "f16", PYLLM_D32, PYLLM_FIRST_32, "32", "33", "34");
  else if constexpr (std::is_same_v<T, bf16>)
    PYLLM_WGMMA_ROWS("128", "bf16", PYLLM_D64, PYLLM_FIRST_32 ", " PYLLM_SECOND_32, "64", "65", "66");
  else
    PYLLM_WGMMA_ROWS("128", "f16", PYLLM_D64, PYLLM_FIRST_32 ", " PYLLM_SECOND_32, "64", "65", "66");
#else
  simt::wgmma(&d[0][0], nullptr, a.address, b.address, b.panel_bytes, N, add, false, decode_bits<T>, SIMT_CALLER);
#endif
}

// a from registers, as mma has it; b of columns.
#define PYLLM_WGMMA_COLUMNS(shape, type, registers, list, a_at, b_at)                                                \
  asm volatile(PYLLM_WGMMA(shape, type) "{" list "}, {" a_at "}, %" b_at ", 1, 1, 1, 1;"                             \
               : registers : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits))
template <class T, int N>
PYLLM_PRIMITIVE void wgmma_columns(float (&d)[N][4], const uint32_t (&a)[4], PanelOperand b) {
  static_assert(N == 8 || N == 16, "64 or 128 columns");
#if defined(__CUDACC__)
  if constexpr (N == 8 && std::is_same_v<T, bf16>)
    PYLLM_WGMMA_COLUMNS("64", "bf16", PYLLM_D32, PYLLM_FIRST_32, "%32, %33, %34, %35", "36");
  else if constexpr (N == 8)
    PYLLM_WGMMA_COLUMNS("64", "f16", PYLLM_D32, PYLLM_FIRST_32, "%32, %33, %34, %35", "36");
  else if constexpr (std::is_same_v<T, bf16>)
    PYLLM_WGMMA_COLUMNS("128", "bf16", PYLLM_D64, PYLLM_FIRST_32 ", " PYLLM_SECOND_32, "%64, %65, %66, %67", "68");
  else
    PYLLM_WGMMA_COLUMNS("128", "f16", PYLLM_D64, PYLLM_FIRST_32 ", " PYLLM_SECOND_32, "%64, %65, %66, %67", "68");
#else
  simt::wgmma(&d[0][0], a, 0, b.address, b.panel_bytes, N, true, true, decode_bits<T>, SIMT_CALLER);
#endif
}

}  // namespace pyllm
