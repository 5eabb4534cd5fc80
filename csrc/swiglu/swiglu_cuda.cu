// SwiGLU's gate, forward and backward, element by element.
//
//   s = 1 / (1 + exp(-gate))       0 where exp(-gate) overflows, as it should be
//   y = gate * s * up              computed in float32, rounded once
//
//   dup = dy * gate * s            dgate = dy * up * s * (1 + gate * (1 - s))
//
// Nothing but gate and up is kept for the backward: to compute s again is cheaper than any byte.
//
// A block works on a tile: blockDim.y rows, kVectors * blockDim.x vectors of V elements wide. The grid walks over the
// tiles of a row before it goes to the next rows. In the packed form gate and up are two halves of one buffer: the
// caller passes its two addresses.
#include "swiglu/swiglu_cuda.h"

#include "common/launch.cuh"

namespace pyllm {
namespace {

constexpr int kThreads = 256;
// Vectors of each tensor that a thread has in flight: 2 of gate and 2 of up are 64 bytes, 128 KB for a multiprocessor's
// 2048 threads, several times what hides the latency of any memory.
constexpr int kVectors = 2;

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// A thread's part of a tile: its row and its first vector.
struct Place {
  int64_t row;
  int vector;
};
__device__ __forceinline__ Place place(int tiles) {
  const int64_t tile = blockIdx.x / tiles;
  return {tile * blockDim.y + threadIdx.y, int(blockIdx.x % tiles) * kVectors * int(blockDim.x) + int(threadIdx.x)};
}

// Bytes, the floor: 3 * sizeof(T) an element.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) swiglu_fwd_kernel(const T* __restrict__ gate, const T* __restrict__ up,
                                                              T* __restrict__ y, int64_t rows, int cols,
                                                              int64_t gate_stride, int64_t up_stride, int tiles) {
  const Place at = place(tiles);
  const int vectors = at.row < rows ? cols / V : 0;
  gate += at.row * gate_stride;
  up += at.row * up_stride;
  y += at.row * cols;

  Vec<T, V> g[kVectors], u[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = at.vector + k * blockDim.x;
    g[k] = Vec<T, V>::load_if(i < vectors, gate + int64_t(i) * V);
    u[k] = Vec<T, V>::load_if(i < vectors, up + int64_t(i) * V);
  }
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = at.vector + k * blockDim.x;
    float out[V];
#pragma unroll
    for (int j = 0; j < V; j++) out[j] = g[k][j] * sigmoid(g[k][j]) * u[k][j];
    if (i < vectors) Vec<T, V>::round(out).store(y + int64_t(i) * V);
  }
}

// Bytes, the floor: 5 * sizeof(T) an element.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) swiglu_bwd_kernel(
    const T* __restrict__ dy, const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ dgate,
    T* __restrict__ dup, int64_t rows, int cols, int64_t dy_stride, int64_t gate_stride, int64_t up_stride,
    int64_t dgate_stride, int64_t dup_stride, int tiles) {
  const Place at = place(tiles);
  const int vectors = at.row < rows ? cols / V : 0;
  dy += at.row * dy_stride;
  gate += at.row * gate_stride;
  up += at.row * up_stride;
  dgate += at.row * dgate_stride;
  dup += at.row * dup_stride;

  Vec<T, V> d[kVectors], g[kVectors], u[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = at.vector + k * blockDim.x;
    d[k] = Vec<T, V>::load_if(i < vectors, dy + int64_t(i) * V);
    g[k] = Vec<T, V>::load_if(i < vectors, gate + int64_t(i) * V);
    u[k] = Vec<T, V>::load_if(i < vectors, up + int64_t(i) * V);
  }
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = at.vector + k * blockDim.x;
    float of_gate[V], of_up[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float x = g[k][j], s = sigmoid(x);
      of_up[j] = d[k][j] * (x * s);
      of_gate[j] = d[k][j] * u[k][j] * (s * (1.f + x * (1.f - s)));
    }
    if (i < vectors) {
      Vec<T, V>::round(of_gate).store(dgate + int64_t(i) * V);
      Vec<T, V>::round(of_up).store(dup + int64_t(i) * V);
    }
  }
}

// ---- host side -----------------------------------------------------------------------------------------------------
// Threads (along a row, rows) of a block, tiles of a row, blocks of the grid.
struct Shape {
  dim3 block;
  int tiles;
  int64_t blocks;

  Shape(int64_t rows, int64_t vectors) {
    unsigned width = 1;
    while (width < kThreads && int64_t(width) * kVectors < vectors) width *= 2;
    const unsigned most = unsigned(kThreads / width);
    const unsigned groups = rows < most ? unsigned(rows) : most;
    block = dim3(width, groups);
    tiles = int((vectors + width * kVectors - 1) / (width * kVectors));
    blocks = (rows + groups - 1) / groups * tiles;
  }
};

template <class T, int V>
int forward(const SwigluForward& a, void* stream) {
  const Shape shape(a.rows, a.cols / V);
  if (shape.blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  return launch(swiglu_fwd_kernel<T, V>, dim3(unsigned(shape.blocks)), shape.block, stream,
                static_cast<const T*>(a.gate), static_cast<const T*>(a.up), static_cast<T*>(a.y), a.rows, int(a.cols),
                a.gate_stride, a.up_stride, shape.tiles);
}

template <class T, int V>
int backward(const SwigluBackward& a, void* stream) {
  const Shape shape(a.rows, a.cols / V);
  if (shape.blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  return launch(swiglu_bwd_kernel<T, V>, dim3(unsigned(shape.blocks)), shape.block, stream,
                static_cast<const T*>(a.dy), static_cast<const T*>(a.gate), static_cast<const T*>(a.up),
                static_cast<T*>(a.dgate), static_cast<T*>(a.dup), a.rows, int(a.cols), a.dy_stride, a.gate_stride,
                a.up_stride, a.dgate_stride, a.dup_stride, shape.tiles);
}

}  // namespace

int swiglu_fwd(const SwigluForward& a, void* stream) {
  if (a.rows == 0 || a.cols == 0) return 0;
  return dispatch(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = vector_length<T>();
    const auto fit = [&](const void* first, int64_t stride) {
      return vectors_fit<T, V>(static_cast<const T*>(first), a.rows > 1 ? stride : 0);
    };
    const bool all = a.cols % V == 0 && fit(a.gate, a.gate_stride) && fit(a.up, a.up_stride) && fit(a.y, a.cols);
    return all ? forward<T, V>(a, stream) : forward<T, 1>(a, stream);
  });
}

int swiglu_bwd(const SwigluBackward& a, void* stream) {
  if (a.rows == 0 || a.cols == 0) return 0;
  return dispatch(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = vector_length<T>();
    const auto fit = [&](const void* first, int64_t stride) {
      return vectors_fit<T, V>(static_cast<const T*>(first), a.rows > 1 ? stride : 0);
    };
    const bool all = a.cols % V == 0 && fit(a.dy, a.dy_stride) && fit(a.gate, a.gate_stride) &&
                     fit(a.up, a.up_stride) && fit(a.dgate, a.dgate_stride) && fit(a.dup, a.dup_stride);
    return all ? backward<T, V>(a, stream) : backward<T, 1>(a, stream);
  });
}

}  // namespace pyllm
