// Wrappers of csrc/common/hopper.cuh.
#include "primitives.h"

#include "common/hopper.cuh"
#include "common/launch.cuh"

namespace {

using namespace pyllm;

struct Maps {
  TensorMap a, b;
};
__device__ unsigned char* aligned(unsigned char* shared) {
  const uint32_t past = uint32_t(reinterpret_cast<uintptr_t>(shared)) % kPanelAlignment;
  return shared + (past ? kPanelAlignment - past : 0);
}

// d's 64 rows and 8 N columns to out.
template <int N>
__device__ void store(void* out, const float (&d)[N][4]) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, col = 2 * (threadIdx.x % 4);
  for (int n = 0; n < N; n++)
    for (int i = 0; i < 4; i++)
      static_cast<float*>(out)[(row + i / 2 * 8) * 8 * N + 8 * n + col + i % 2] = d[n][i];
}

// A box of 64 rows by TMA, from row n and column 64 on of a (2, 100, 3, 200) tensor's head 1 of batch 1, as it lies in
// shared memory: row for row, chunks permuted.
__global__ void box_of(Operands x, const __grid_constant__ Maps maps) {
  SHARED_DYNAMIC(bytes);
  unsigned char* panel = aligned(bytes);
  const Mbarrier full{reinterpret_cast<uint64_t*>(panel + 64 * kPanelRow)};
  if (threadIdx.x == 0) {
    full.init(1);
    mbarriers_are_ready();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    full.arrive_expecting(64 * kPanelRow);
    fetch_box(panel, maps.a, full, 64, 1, x.n, 1);
  }
  full.wait(0);
  for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) {
    const int row = i / 8, chunk = i % 8;
    static_cast<uint4*>(x.out)[i] = *reinterpret_cast<uint4*>(panel + row * kPanelRow + (chunk ^ row % 8) * 16);
  }
}

// a (64, 128) by TMA; b (8 N, 128), or of columns (128, 8 N), likewise; d = a b.
template <class T, int N, bool kColumns>
__global__ void wgmma_of(Operands x, const __grid_constant__ Maps maps) {
  SHARED_DYNAMIC(bytes);
  constexpr int kOfA = 64 * kPanelRow, kRows = kColumns ? 128 : 8 * N, kOfB = kRows * kPanelRow;
  constexpr int kPanels = kColumns ? N / 8 : 2;
  unsigned char *a = aligned(bytes), *b = a + 2 * kOfA;
  const Mbarrier full{reinterpret_cast<uint64_t*>(b + kPanels * kOfB)};
  if (threadIdx.x == 0) {
    full.init(1);
    mbarriers_are_ready();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    full.arrive_expecting(2 * kOfA + kPanels * kOfB);
    for (int p = 0; p < 2; p++) fetch_box(a + p * kOfA, maps.a, full, p * kPanelColumns, 0, 0, 0);
    for (int p = 0; p < kPanels; p++) fetch_box(b + p * kOfB, maps.b, full, p * kPanelColumns, 0, 0, 0);
  }
  full.wait(0);
  float d[N][4];
  uint32_t of_a[8][4];
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int n = 0; n < N; n++)
    for (int i = 0; i < 4; i++) d[n][i] = kColumns ? 0.f : 7.f;  // the first of the other adds to nothing
  for (int step = 0; step < 8; step++)
    for (int i = 0; i < 4; i++)
      of_a[step][i] = static_cast<const uint32_t*>(x.a)[(row + i % 2 * 8) * 64 + 8 * step + t + i / 2 * 4];
  pin(d);
  pin(of_a);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < 8; step++) {
    if constexpr (kColumns) wgmma_columns<T>(d, of_a[step], operand_of_columns(b, kOfB, step));
    else wgmma_rows<T>(d, operand_of_rows(a, kOfA, step), operand_of_rows(b, kOfB, step), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  store(x.out, d);
}

// b (64, 64) stored by plain stores, fenced, and read by wgmma.
__global__ void fence_of(Operands x, const __grid_constant__ Maps) {
  SHARED_DYNAMIC(bytes);
  unsigned char* tile = aligned(bytes);
  for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x)
    *reinterpret_cast<uint4*>(tile + i / 8 * kPanelRow + (i % 8 ^ i / 8 % 8) * 16) = static_cast<const uint4*>(x.b)[i];
  stores_are_for_wgmma();
  __syncthreads();
  float d[8][4];
  pin(d);
  wgmma_begin();
  for (int step = 0; step < 4; step++)
    wgmma_rows<bf16>(d, operand_of_rows(tile, 0, step), operand_of_rows(tile, 0, step), step > 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin(d);
  store(x.out, d);
}

// A warpgroup hands n floats on to another, 128 at a time, through two stages; then both meet at a named barrier.
__global__ void __launch_bounds__(256, 4) ring_of(Operands x, const __grid_constant__ Maps) {
  SHARED_DYNAMIC(bytes);
  float* stages = reinterpret_cast<float*>(bytes);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(bytes + 4096);
  auto full = [&](int stage) { return Mbarrier{barriers + stage}; };
  auto empty = [&](int stage) { return Mbarrier{barriers + 2 + stage}; };
  const float* a = static_cast<const float*>(x.a);
  float* out = static_cast<float*>(x.out);
  const int thread = threadIdx.x % kWarpgroup;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; stage++) {
      full(stage).init(kWarpgroup);
      empty(stage).init(4);
    }
    mbarriers_are_ready();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<40>();
    for (int i = 0; i < x.n / kWarpgroup; i++) {
      empty(i % 2).wait(i / 2 % 2 ^ 1);
      stages[i % 2 * kWarpgroup + thread] = a[i * kWarpgroup + thread];
      full(i % 2).arrive();
    }
    named_barrier_arrive(1, 2 * kWarpgroup);
  } else {
    take_registers<88>();  // with the others' 40 just what 64 for each had been
    float sum = 0.f;
    for (int i = 0; i < x.n / kWarpgroup; i++) {
      full(i % 2).wait(i / 2 % 2);
      sum += stages[i % 2 * kWarpgroup + (thread + 1) % kWarpgroup];
      __syncwarp();
      if (thread % 32 == 0) empty(i % 2).arrive();
    }
    named_barrier_wait(1, 2 * kWarpgroup);
    out[thread] = sum;
  }
}

template <class T, bool kColumns>
int wgmma(int N, const Operands& x, void* stream) {
  Maps maps;
  const int rows = kColumns ? 128 : 8 * N, cols = kColumns ? 8 * N : 128;
  if (const int error = encode(&maps.a, {x.a, 128, 1, 64, 1, 0, 128, 0, 64})) return error;
  if (const int error = encode(&maps.b, {x.b, cols, 1, rows, 1, 0, cols, 0, rows})) return error;
  const auto kernel = N == 8 ? wgmma_of<T, 8, kColumns> : wgmma_of<T, 16, kColumns>;
  return launch_shared(kernel, dim3(1), dim3(128), 1024 + 2 * 64 * 128 + 2 * 128 * 128 + 64, stream, x, maps);
}

}  // namespace

int run_hopper_primitive(const std::string& name, const Operands& x, void* stream) {
  Maps maps = {};
  if (name == "box") {
    if (const int error = encode(&maps.a, {x.a, 200, 3, 100, 2, 200, 600, 60000, 64})) return error;
    return launch_shared(box_of, dim3(1), dim3(64), 1024 + 64 * 128 + 64, stream, x, maps);
  }
  if (name == "fence") return launch_shared(fence_of, dim3(1), dim3(128), 1024 + 64 * 128, stream, x, maps);
  if (name == "ring") return launch_shared(ring_of, dim3(1), dim3(256), 8192, stream, x, maps);
  for (int N : {8, 16}) {
    const std::string columns = std::to_string(8 * N);
    if (name == "wgmma_rows_bfloat16_" + columns) return wgmma<bf16, false>(N, x, stream);
    if (name == "wgmma_rows_float16_" + columns) return wgmma<f16, false>(N, x, stream);
    if (name == "wgmma_columns_bfloat16_" + columns) return wgmma<bf16, true>(N, x, stream);
    if (name == "wgmma_columns_float16_" + columns) return wgmma<f16, true>(N, x, stream);
  }
  return -1;
}
