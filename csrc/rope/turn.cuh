// Rotation in registers, shared by the kernels of this folder. Pair i of a head's first R of D elements:
//
//   a' = a cos - b sin      b' = b cos + a sin
//
// Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved. A thread turns units: two vectors of V elements, which are V
// firsts and V seconds of half-split pairs, or 2V neighbours, V interleaved pairs.
#pragma once
#include "common/device.cuh"

namespace pyllm {

constexpr int kMostTurnThreads = 256;

// The angles of V neighbouring pairs, from a row of the tables.
template <int V>
struct Angles {
  float cos[V], sin[V];

  // vectors: both rows begin where vectors of floats may.
  __device__ __forceinline__ void load(const float* c, const float* s, bool vectors, float sign) {
    constexpr int N = V < 4 ? V : 4;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < V; i += N) {
        const auto a = Vec<float, N>::load(c + i), b = Vec<float, N>::load(s + i);
#pragma unroll
        for (int j = 0; j < N; j++) cos[i + j] = a[j], sin[i + j] = sign * b[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; j++) cos[j] = c[j], sin[j] = sign * s[j];
    }
  }
};

// Where the two vectors of a unit begin in a head.
template <int V, bool kInterleaved>
__device__ __forceinline__ int first_of(int unit) { return kInterleaved ? 2 * unit * V : unit * V; }
template <int V, bool kInterleaved>
__device__ __forceinline__ int second_of(int unit, int half) {
  const int first = first_of<V, kInterleaved>(unit);
  return kInterleaved ? first + V : half + first;
}

// Pair j: elements j of the two vectors, or elements 2j and 2j + 1 of the two laid end to end.
template <int V, bool kInterleaved>
__device__ __forceinline__ void rotate(float (&u)[V], float (&v)[V], const Angles<V>& angles) {
  float of_u[V], of_v[V];
#pragma unroll
  for (int j = 0; j < V; j++) {
    const float a = !kInterleaved ? u[j] : 2 * j < V ? u[2 * j] : v[2 * j - V];
    const float b = !kInterleaved ? v[j] : 2 * j + 1 < V ? u[2 * j + 1] : v[2 * j + 1 - V];
    const float turned_a = a * angles.cos[j] - b * angles.sin[j], turned_b = b * angles.cos[j] + a * angles.sin[j];
    if (!kInterleaved) {
      of_u[j] = turned_a;
      of_v[j] = turned_b;
    } else {
      if (2 * j < V) of_u[2 * j] = turned_a;
      else of_v[2 * j - V] = turned_a;
      if (2 * j + 1 < V) of_u[2 * j + 1] = turned_b;
      else of_v[2 * j + 1 - V] = turned_b;
    }
  }
#pragma unroll
  for (int j = 0; j < V; j++) u[j] = of_u[j], v[j] = of_v[j];
}

// One unit of one head, from x to out, whose elements may lie `out_step` apart where they go one by one.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void turn(const T* x, T* out, int64_t out_step, int unit, int half,
                                     const Angles<V>& angles) {
  const int first = first_of<V, kInterleaved>(unit), second = second_of<V, kInterleaved>(unit, half);
  const auto u = Vec<T, V>::load(x + first), v = Vec<T, V>::load(x + second);
  float of_u[V], of_v[V];
#pragma unroll
  for (int j = 0; j < V; j++) of_u[j] = u[j], of_v[j] = v[j];
  rotate<V, kInterleaved>(of_u, of_v, angles);
  Vec<T, V>::round(of_u).store(V == 1 ? out + first * out_step : out + first);
  Vec<T, V>::round(of_v).store(V == 1 ? out + second * out_step : out + second);
}

// All heads of one token of q or of k. Thread (x, y) holds the angles of V pairs, unit x of a head, and turns them in every
// blockDim.y-th head: angles are read once for all of its heads.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void turn_heads(const T* x, int64_t head_stride, T* out, int64_t out_stride, int64_t out_step,
                                           int heads, int D, int R, const float* cos, const float* sin, bool vectors,
                                           float sign) {
  const int half = R / 2;
  for (int unit = threadIdx.x; unit < half / V; unit += blockDim.x) {
    Angles<V> angles;
    angles.load(cos + unit * V, sin + unit * V, vectors, sign);
    for (int head = threadIdx.y; head < heads; head += blockDim.y)
      turn<T, V, kInterleaved>(x + head * head_stride, out + head * out_stride, out_step, unit, half, angles);
  }
  for (int i = R + threadIdx.x * V; i < D; i += blockDim.x * V)
    for (int head = threadIdx.y; head < heads; head += blockDim.y)
      Vec<T, V>::load(x + head * head_stride + i).store(out + head * out_stride + (V == 1 ? i * out_step : i));
}

// ---- host side -----------------------------------------------------------------------------------------------------
// Blocks of threads (x, y): x a unit of a head, or a vector of what isn't turned; y a head.
struct TurnBlock {
  unsigned width = 1, groups = 1;

  TurnBlock(int64_t D, int64_t R, int64_t V, int64_t heads, unsigned widest = kMostTurnThreads) {
    const int64_t units = R / 2 / V, rest = (D - R) / V, wanted = units > rest ? units : rest;
    while (width < wanted && width < widest) width *= 2;
    // Few heads per thread, so that many are in flight, but more than one: they share the angles.
    while (groups * width < kMostTurnThreads && int64_t(groups) * 2 < heads) groups *= 2;
  }
};

template <class T, int V>
bool heads_fit(const void* first, const int64_t (&stride)[3]) {
  return vectors_fit<T, V>(static_cast<const T*>(first), stride[2]) && stride[0] % V == 0 && stride[1] % V == 0;
}

// Do rows of a table, with strides of batch and row, begin where vectors of floats may?
inline bool tables_fit(const float* first, const int64_t (&stride)[2]) {
  return vectors_fit<float, 4>(first, stride[0]) && stride[1] % 4 == 0;
}

}  // namespace pyllm
