// As probes.cu, of what only Hopper has: mbarriers, TMA copies, named barriers, wgmma. By the kernels' own wrappers.
#include "common/hopper.cuh"
#include "probes.h"

namespace {

using namespace pyllm;

__device__ float* dynamic_floats() { return reinterpret_cast<float*>(simt::dynamic_shared()); }
__device__ Mbarrier a_barrier(int i = 0) { return {reinterpret_cast<uint64_t*>(dynamic_floats() + 64) + i}; }

// ---- copies that an mbarrier counts ----------------------------------------------------------------------------------
enum class Wait { kAll, kNobody, kOneThread };

template <int kExpected, Wait kWait>
__device__ void bulk_copy_of_64_floats(Data d) {
  if (threadIdx.x == 0) a_barrier().init(1);
  __syncthreads();
  if (threadIdx.x == 0) {
    a_barrier().arrive_expecting(kExpected);
    for (int i = 0; i < 16; i++)
      simt::bulk_copy(a_barrier().at, dynamic_floats() + 4 * i, d.in + 4 * i, 16, 16, SIMT_CALLER);
  }
  if (kWait == Wait::kAll || (kWait == Wait::kOneThread && threadIdx.x == 0)) a_barrier().wait(0);
  d.out[threadIdx.x] = dynamic_floats()[threadIdx.x];
}
__global__ void bulk_copy(Data d) { bulk_copy_of_64_floats<256, Wait::kAll>(d); }
__global__ void bulk_copy_without_wait(Data d) { bulk_copy_of_64_floats<256, Wait::kNobody>(d); }
__global__ void bulk_copy_one_thread_waits_for(Data d) { bulk_copy_of_64_floats<256, Wait::kOneThread>(d); }
__global__ void bulk_copy_expecting_too_much(Data d) { bulk_copy_of_64_floats<272, Wait::kAll>(d); }
__global__ void mbarrier_not_initialised(Data) { a_barrier().arrive(); }
__global__ void mbarrier_initialised_without_barrier(Data) {
  if (threadIdx.x == 0) a_barrier().init(64);
  __syncwarp();
  a_barrier().arrive();
}

// ---- order by mbarriers and by named barriers ------------------------------------------------------------------------
// The first warp writes for the second, which says when it has read, so that the first may write again.
template <bool kFull, bool kEmpty>
__device__ void hand_over(Data d) {
  float* shared = dynamic_floats();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    a_barrier(0).init(32);
    a_barrier(1).init(32);
  }
  __syncthreads();
  for (int round = 0; round < 2; round++) {
    if (threadIdx.x < 32) {
      if (kEmpty) a_barrier(1).wait(round ^ 1);  // the first time nobody has read yet
      shared[lane] = d.in[32 * round + lane];
      if (kFull) a_barrier(0).arrive();
    } else {
      if (kFull) a_barrier(0).wait(round);
      d.out[32 * round + lane] = shared[31 - lane];
      a_barrier(1).arrive();
    }
  }
}
__global__ void handed_over_twice(Data d) { hand_over<true, true>(d); }
__global__ void handed_over_before_it_is_full(Data d) { hand_over<false, true>(d); }
__global__ void handed_over_before_it_is_empty(Data d) { hand_over<true, false>(d); }

// The third warp comes to no barrier.
template <bool kAll>
__device__ void named(Data d) {
  float* shared = dynamic_floats();
  shared[threadIdx.x] = d.in[threadIdx.x % 64];
  if (kAll || threadIdx.x < 64) named_barrier_wait(1, kAll ? 96 : 64);
  if (threadIdx.x < 64) d.out[threadIdx.x] = shared[threadIdx.x + 32];
}
__global__ void named_barrier_of_all(Data d) { named<true>(d); }
__global__ void named_barrier_of_some(Data d) { named<false>(d); }
__global__ void named_barrier_arrived_at(Data d) {  // warp 0 goes on, warp 1 waits for it
  float* shared = dynamic_floats();
  if (threadIdx.x < 32) {
    shared[threadIdx.x] = d.in[threadIdx.x];
    named_barrier_arrive(2, 64);
  } else {
    named_barrier_wait(2, 64);
    d.out[threadIdx.x - 32] = shared[threadIdx.x - 32];
  }
}
__global__ void named_barrier_counts_differ(Data) {
  if (threadIdx.x < 32) named_barrier_arrive(1, 64);
  else named_barrier_wait(1, 96);
}

// ---- operands of wgmma -----------------------------------------------------------------------------------------------
template <bool kWait, bool kFence>
__device__ void wgmma_operand(Data d) {
  float* shared = dynamic_floats();
  if (threadIdx.x < 64) shared[threadIdx.x] = d.in[threadIdx.x];
  if (kFence) stores_are_for_wgmma();
  __syncthreads();
  simt::warpgroup_sync("wgmma.mma_async");
  if (threadIdx.x == 0) simt::wgmma_read(shared, 256, SIMT_CALLER);
  wgmma_commit();
  if (kWait) wgmma_wait<0>();
  __syncthreads();
  if (threadIdx.x < 64) d.out[threadIdx.x] = shared[threadIdx.x] = 1.f;
  wgmma_wait<0>();
}
__global__ void wgmma_operand_overwritten_after_wait(Data d) { wgmma_operand<true, true>(d); }
__global__ void wgmma_operand_overwritten_early(Data d) { wgmma_operand<false, true>(d); }
__global__ void wgmma_operand_stored_without_fence(Data d) { wgmma_operand<true, false>(d); }
__global__ void wgmma_without_a_warp(Data d) {
  if (threadIdx.x >= 32) simt::warpgroup_sync("wgmma.mma_async");
  if (threadIdx.x < 64) d.out[threadIdx.x] = 0.f;
}

// ---- products of bfloat16 matrices, A (64, 64) and then B (64, 64) in `in` -------------------------------------------
constexpr int kTile = 64 * kPanelRow;

// Both tiles by TMA.
__device__ void fetch_tiles(Data d) {
  unsigned char* shared = simt::dynamic_shared();
  const Mbarrier barrier{reinterpret_cast<uint64_t*>(shared + 2 * kTile)};
  if (threadIdx.x == 0) {
    barrier.init(1);
    barrier.arrive_expecting(2 * kTile);
    for (int tile = 0; tile < 2; tile++) {
      TensorMap map;
      const unsigned char* first = reinterpret_cast<const unsigned char*>(d.in) + tile * kTile;
      encode(&map, {first, d.n, 1, 64, 1, 0, 64, 0, 64});
      fetch_box(shared + tile * kTile, map, barrier, 0, 0, 0, 0);
    }
  }
  __syncthreads();
  barrier.wait(0);
}
__device__ void store_product(Data d, const float (&product)[8][4]) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = 2 * (threadIdx.x % 4);
  for (int n = 0; n < 8; n++)
    for (int i = 0; i < 4; i++) d.out[(row + 8 * (i / 2)) * 64 + 8 * n + col + i % 2] = product[n][i];
}

template <bool kFence, bool kTouch>
__device__ void product_of_rows(Data d) {  // A B^T
  fetch_tiles(d);
  const unsigned char *a = simt::dynamic_shared(), *b = a + kTile;
  float product[8][4];
  for (auto& of : product)
    for (float& x : of) x = 7.f;  // to be set, not added to
  if (kFence) wgmma_begin();
  for (int step = 0; step < 4; step++)
    wgmma_rows<bf16>(product, operand_of_rows(a, kTile, step), operand_of_rows(b, kTile, step), step > 0);
  wgmma_commit();
  if (kTouch) product[3][1] *= 2.f;
  wgmma_wait<0>();
  store_product(d, product);
}
__global__ void wgmma_of_rows(Data d) { product_of_rows<true, false>(d); }
__global__ void wgmma_without_fence(Data d) { product_of_rows<false, false>(d); }
__global__ void wgmma_result_touched_early(Data d) { product_of_rows<true, true>(d); }

template <bool kTouch>
__device__ void product_of_columns(Data d) {  // A B, A from registers
  fetch_tiles(d);
  const uint16_t* in = reinterpret_cast<const uint16_t*>(d.in);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  uint32_t a[4][4];
  for (int step = 0; step < 4; step++)
    for (int i = 0; i < 4; i++)
      std::memcpy(&a[step][i], in + (row + i % 2 * 8) * 64 + 16 * step + 2 * (lane % 4) + i / 2 * 8, 4);
  float product[8][4] = {};
  wgmma_begin();
  for (int step = 0; step < 4; step++)
    wgmma_columns<bf16>(product, a[step], operand_of_columns(simt::dynamic_shared() + kTile, kTile, step));
  wgmma_commit();
  if (kTouch) a[1][2] = 0;
  wgmma_wait<0>();
  store_product(d, product);
}
__global__ void wgmma_of_columns(Data d) { product_of_columns<false>(d); }
__global__ void wgmma_operand_in_registers_touched_early(Data d) { product_of_columns<true>(d); }
__global__ void wgmma_not_waited_for(Data d) {
  float product[8][4] = {};
  fetch_tiles(d);
  wgmma_begin();
  wgmma_rows<bf16>(product, operand_of_rows(simt::dynamic_shared(), kTile, 0),
                   operand_of_rows(simt::dynamic_shared(), kTile, 0), false);
  wgmma_commit();
}

#define PROBE(kernel) {#kernel, kernel}

}  // namespace

std::vector<Probe> hopper_probes() {
  return {
      PROBE(bulk_copy), PROBE(bulk_copy_without_wait), PROBE(bulk_copy_one_thread_waits_for),
      PROBE(bulk_copy_expecting_too_much), PROBE(mbarrier_not_initialised), PROBE(mbarrier_initialised_without_barrier),
      PROBE(handed_over_twice), PROBE(handed_over_before_it_is_full), PROBE(handed_over_before_it_is_empty),
      PROBE(named_barrier_of_all), PROBE(named_barrier_of_some), PROBE(named_barrier_arrived_at),
      PROBE(named_barrier_counts_differ), PROBE(wgmma_operand_overwritten_after_wait),
      PROBE(wgmma_operand_overwritten_early), PROBE(wgmma_operand_stored_without_fence), PROBE(wgmma_without_a_warp),
      PROBE(wgmma_of_rows), PROBE(wgmma_without_fence), PROBE(wgmma_result_touched_early), PROBE(wgmma_of_columns),
      PROBE(wgmma_operand_in_registers_touched_early), PROBE(wgmma_not_waited_for),
  };
}
