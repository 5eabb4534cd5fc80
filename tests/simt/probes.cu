// Small kernels, right and wrong ones, that show what the machine notices. Each is named by what it does;
// test_machine.py says what must be reported. Results go to out; in has n floats.
#include <string>

#include "common/device.cuh"
#include "probes.h"
#include "tensor_core.h"

namespace {

using pyllm::block_sum;
using pyllm::Vec;

__device__ float* dynamic_floats() { return reinterpret_cast<float*>(simt::dynamic_shared()); }

// ---- barriers and shared memory ------------------------------------------------------------------------------------
__global__ void two_block_sums(Data d) {
  const float a = block_sum(d.in[threadIdx.x], 0), b = block_sum(2 * d.in[threadIdx.x], 1);
  d.out[threadIdx.x] = a + b;
}
__global__ void block_sum_without_turns(Data d) {
  const float a = block_sum(d.in[threadIdx.x]), b = block_sum(2 * d.in[threadIdx.x]);
  d.out[threadIdx.x] = a + b;
}
__global__ void neighbour_after_barrier(Data d) {
  float* shared = dynamic_floats();
  shared[threadIdx.x] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
__global__ void neighbour_without_barrier(Data d) {
  float* shared = dynamic_floats();
  shared[threadIdx.x] = d.in[threadIdx.x];
  d.out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
__global__ void lane_after_syncwarp(Data d) {
  float* shared = dynamic_floats();
  shared[threadIdx.x] = d.in[threadIdx.x];
  __syncwarp();
  d.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
__global__ void other_warp_after_syncwarp(Data d) {
  float* shared = dynamic_floats();
  shared[threadIdx.x] = d.in[threadIdx.x];
  __syncwarp();
  d.out[threadIdx.x] = shared[threadIdx.x ^ 32];
}
__global__ void overwrite_what_others_read(Data d) {
  float* shared = dynamic_floats();
  if (threadIdx.x == 0) shared[0] = d.in[0];
  __syncthreads();
  d.out[threadIdx.x] = shared[0];
  if (threadIdx.x == 0) shared[0] = 1.f;
}
__global__ void uninitialised_shared(Data d) {
  __shared__ float value[64];
  if (threadIdx.x < 32) value[threadIdx.x] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = value[threadIdx.x];
}
__global__ void past_dynamic_shared(Data d) { d.out[threadIdx.x] = dynamic_floats()[threadIdx.x + 128] = 0.f; }

// ---- global memory -------------------------------------------------------------------------------------------------
__global__ void copy(Data d) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < d.n) d.out[i] = d.in[i];
}
__global__ void read_past_the_end(Data d) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < d.n) d.out[i] = d.in[i] + 0 * d.in[i + 1];
}
__global__ void write_past_the_end(Data d) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i <= d.n) d.out[i] = 0.f;
}
__global__ void misaligned_vector(Data d) {
  if (threadIdx.x == 0) Vec<float, 4>::load(d.in + 1).store(d.out);
}
__global__ void blocks_share_an_element(Data d) { d.out[threadIdx.x] = d.in[threadIdx.x] + blockIdx.x; }
__global__ void block_reads_what_another_wrote(Data d) {
  if (blockIdx.x == 0) d.out[threadIdx.x] = 1.f;
  else if (d.out[threadIdx.x] == 7.f) d.out[threadIdx.x + blockDim.x] = 2.f;
}
__global__ void count_atomically(Data d) { atomicAdd(d.out, 1.f); }
__global__ void count_plainly(Data d) { d.out[0] += 1.f; }

// ---- control flow --------------------------------------------------------------------------------------------------
__global__ void barrier_in_a_branch(Data d) {
  if (threadIdx.x < 32) __syncthreads();
  d.out[threadIdx.x] = 0.f;
}
__global__ void exit_before_a_barrier(Data d) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  d.out[threadIdx.x] = 0.f;
}
__global__ void shuffle_in_a_branch(Data d) {
  float x = d.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
  d.out[threadIdx.x] = x;
}
__global__ void shuffle_outside_the_mask(Data d) {
  d.out[threadIdx.x] = __shfl_xor_sync(0xffffu, d.in[threadIdx.x], 1);
}
__global__ void lanes_at_different_places(Data d) {
  if (threadIdx.x % 2) d.out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
  else d.out[threadIdx.x] = float(__ballot_sync(0xffffffffu, 1));
}

// ---- copies in flight: what wrappers of cp.async, bulk copies and wgmma will call -----------------------------------
__device__ void fetch(const Data& d, int i) {
  simt::cp_async(dynamic_floats() + 4 * i, d.in + 4 * i, 16, 16, SIMT_CALLER);
}

__global__ void cp_async_waited_for(Data d) {
  if (threadIdx.x < 16) fetch(d, threadIdx.x);
  simt::cp_async_commit();
  simt::cp_async_wait(0);
  __syncthreads();
  d.out[threadIdx.x] = dynamic_floats()[threadIdx.x];
}
__global__ void cp_async_without_wait(Data d) {
  if (threadIdx.x < 16) fetch(d, threadIdx.x);
  simt::cp_async_commit();
  __syncthreads();
  d.out[threadIdx.x] = dynamic_floats()[threadIdx.x];
  simt::cp_async_wait(0);
}
__global__ void cp_async_without_barrier(Data d) {
  if (threadIdx.x < 16) fetch(d, threadIdx.x);
  simt::cp_async_commit();
  simt::cp_async_wait(0);
  d.out[threadIdx.x] = dynamic_floats()[threadIdx.x];
}
__global__ void exit_with_cp_async_pending(Data d) {
  if (threadIdx.x < 16) fetch(d, threadIdx.x);
  simt::cp_async_commit();
}

// ---- matrix instructions: out = A B^T of bfloat16 matrices, A and then B in `in` -----------------------------------
float decode(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }

__global__ void mma_16x8x16(Data d) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(dynamic_floats());
  const uint16_t* in = reinterpret_cast<const uint16_t*>(d.in);
  for (int i = threadIdx.x; i < (16 + 8) * 16; i += 32) shared[i] = in[i];
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t a[4], b[4];
  simt::ldmatrix_x4<false>(a, shared + lane % 16 * 16 + lane / 16 * 8, SIMT_CALLER);
  simt::ldmatrix_x4<false>(b, shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8, SIMT_CALLER);
  float product[4] = {};
  simt::mma_m16n8k16<decode>(product, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) d.out[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = product[i];
}

// out = A B^T of floats, A (16, 8) and then B (8, 8) in `in`.
__global__ void mma_16x8x8_tf32(Data d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = __float_as_uint(d.in[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
  for (int i = 0; i < 2; i++) b[i] = __float_as_uint(d.in[128 + g * 8 + t + 4 * i]);
  float product[4] = {};
  simt::mma_m16n8k8_tf32(product, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) d.out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = product[i];
}

// ---- access patterns -----------------------------------------------------------------------------------------------
template <int kStride>
__device__ void pattern(Data d) {
  float* shared = dynamic_floats();
  shared[threadIdx.x * kStride] = 1.f;
  d.out[threadIdx.x * kStride] = shared[threadIdx.x * kStride];
}
__global__ void dense_pattern(Data d) { pattern<1>(d); }
__global__ void strided_pattern(Data d) { pattern<8>(d); }

#define PROBE(kernel) {#kernel, kernel}
const Probe kProbes[] = {
    PROBE(two_block_sums), PROBE(block_sum_without_turns), PROBE(neighbour_after_barrier),
    PROBE(neighbour_without_barrier), PROBE(lane_after_syncwarp), PROBE(other_warp_after_syncwarp),
    PROBE(overwrite_what_others_read), PROBE(uninitialised_shared), PROBE(past_dynamic_shared), PROBE(copy),
    PROBE(read_past_the_end), PROBE(write_past_the_end), PROBE(misaligned_vector), PROBE(blocks_share_an_element),
    PROBE(block_reads_what_another_wrote), PROBE(count_atomically), PROBE(count_plainly), PROBE(barrier_in_a_branch),
    PROBE(exit_before_a_barrier), PROBE(shuffle_in_a_branch), PROBE(shuffle_outside_the_mask),
    PROBE(lanes_at_different_places), PROBE(cp_async_waited_for), PROBE(cp_async_without_wait),
    PROBE(cp_async_without_barrier), PROBE(exit_with_cp_async_pending),  PROBE(mma_16x8x16), PROBE(mma_16x8x8_tf32), PROBE(dense_pattern), PROBE(strided_pattern),
};

}  // namespace

bool run_probe(const std::string& name, const float* in, float* out, int n, int blocks, int threads, int shared_bytes) {
  auto run = [&](const Probe& probe) {
    if (name != probe.name) return false;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    cudaLaunchKernelEx(&config, probe.kernel, Data{in, out, n});
    return true;
  };
  for (const Probe& probe : kProbes)
    if (run(probe)) return true;
  for (const Probe& probe : hopper_probes())
    if (run(probe)) return true;
  return false;
}
