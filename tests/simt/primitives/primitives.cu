// Wrappers of csrc/common/mma.cuh.
#include "primitives.h"

#include "common/launch.cuh"
#include "common/mma.cuh"

namespace {

using namespace pyllm;

__global__ void exp2_of(Operands x) {
  const float* a = static_cast<const float*>(x.a);
  for (int i = threadIdx.x; i < x.n; i += blockDim.x) static_cast<float*>(x.out)[i] = exp2_fast(a[i]);
}

__global__ void exp_of(Operands x) {
  const float* a = static_cast<const float*>(x.a);
  for (int i = threadIdx.x; i < x.n; i += blockDim.x) static_cast<float*>(x.out)[i] = exp_fast(a[i]);
}

__global__ void max_nan_of(Operands x) {
  const float *a = static_cast<const float*>(x.a), *b = static_cast<const float*>(x.b);
  for (int i = threadIdx.x; i < x.n; i += blockDim.x) static_cast<float*>(x.out)[i] = max_nan(a[i], b[i]);
}

__global__ void tf32_of(Operands x) {
  const float* a = static_cast<const float*>(x.a);
  for (int i = threadIdx.x; i < x.n; i += blockDim.x) static_cast<uint32_t*>(x.out)[i] = to_tf32(a[i]);
}

// n floats by way of shared memory; every third chunk of 16 bytes is not there. Two groups, waited for one by one.
__global__ void cp_async_of(Operands x) {
  SHARED_DYNAMIC(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  const float* a = static_cast<const float*>(x.a);
  float* out = static_cast<float*>(x.out);
  const int half = x.n / 2;
  for (int first = 0; first < x.n; first += half) {
    for (int i = 4 * threadIdx.x; i < half; i += 4 * blockDim.x)
      cp_async16(shared + first + i, a + first + i, (first + i) / 4 % 3 != 0);
    cp_async_commit();
  }
  for (int first = 0; first < x.n; first += half) {
    if (first == 0) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < half; i += blockDim.x) out[first + i] = shared[first + half - 1 - i];
  }
}

// Four 8x8 matrices of 16 bits, one below the other, as 32 lanes get them: (32, 4) words.
template <bool kTransposed>
__global__ void ldmatrix_of(Operands x) {
  SHARED_DYNAMIC(bytes);
  uint4* rows = reinterpret_cast<uint4*>(bytes);
  rows[threadIdx.x] = static_cast<const uint4*>(x.a)[threadIdx.x];
  __syncwarp();
  uint32_t got[4];
  ldmatrix<kTransposed>(got, rows + threadIdx.x);
  for (int i = 0; i < 4; i++) static_cast<uint32_t*>(x.out)[4 * threadIdx.x + i] = got[i];
}

// out (16, 8) = a (16, depth) times the transpose of b (8, depth), by fragments as mma.cuh draws them.
template <class T>
__global__ void mma_of(Operands x) {
  constexpr int kWords = kDepth<T> * int(sizeof(T)) / 4, kAcross = kWords / 2;  // of a row; to the other half of it
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t *a = static_cast<const uint32_t*>(x.a), *b = static_cast<const uint32_t*>(x.b);
  uint32_t of_a[4];
  for (int i = 0; i < 4; i++) of_a[i] = a[(g + i % 2 * 8) * kWords + t + i / 2 * kAcross];
  float d[4] = {};
  mma<T>(d, of_a, b[g * kWords + t], b[g * kWords + t + kAcross]);
  for (int i = 0; i < 4; i++) static_cast<float*>(x.out)[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
__global__ void mma_tf32_of(Operands x) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t *a = static_cast<const uint32_t*>(x.a), *b = static_cast<const uint32_t*>(x.b);
  const uint32_t of_a[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float d[4] = {};
  mma_tf32(d, of_a, b[g * 8 + t], b[g * 8 + t + 4]);
  for (int i = 0; i < 4; i++) static_cast<float*>(x.out)[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// A row of a tile in and out again, by chunks: the swizzle is one-to-one.
__global__ void tile_of(Operands x) {
  SHARED_DYNAMIC(bytes);
  const Tile<f16, 96> tile{bytes};
  const uint4* a = static_cast<const uint4*>(x.a);
  for (int c = 0; c < 12; c++) *reinterpret_cast<uint4*>(tile.chunk(threadIdx.x, c)) = a[threadIdx.x * 12 + c];
  __syncwarp();
  for (int col = 0; col < 96; col++)
    static_cast<f16*>(x.out)[threadIdx.x * 96 + col] = *tile.element((threadIdx.x + 1) % 32, col);
}

const struct {
  const char* name;
  void (*kernel)(Operands);
  int threads;
} kPrimitives[] = {
    {"exp2", exp2_of, 64},
    {"exp", exp_of, 64},
    {"max_nan", max_nan_of, 64},
    {"tf32", tf32_of, 64},
    {"cp_async", cp_async_of, 64},
    {"ldmatrix", ldmatrix_of<false>, 32},
    {"ldmatrix_transposed", ldmatrix_of<true>, 32},
    {"mma_bfloat16", mma_of<bf16>, 32},
    {"mma_float16", mma_of<f16>, 32},
    {"mma_float32", mma_of<float>, 32},
    {"mma_tf32", mma_tf32_of, 32},
    {"tile", tile_of, 32},
};

}  // namespace

int run_primitive(const std::string& name, const Operands& operands, void* stream) {
  for (const auto& p : kPrimitives)
    if (name == p.name) return launch_shared(p.kernel, dim3(1), dim3(p.threads), 8192, stream, operands);
  return -1;
}
