// Rotary position embedding, q and k in one launch. Pair i of a head's first R of D elements turns by its token's angle:
//
//   a' = a cos - b sin      b' = b cos + a sin          the rest of the head is copied
//
// Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved. Turning the other way (`conjugate`) is the inverse, and so
// the gradient: rotations are orthogonal.
//
// A block has one token. Thread (x, y) holds the angles of V pairs, unit x of a head, and turns them in every blockDim.y-th
// head of q, then of k: angles are read once for all of its heads. A unit is two vectors of V elements: V firsts and V
// seconds of half-split pairs, or 2V neighbours, which are V interleaved pairs.
//
// Bytes, the floor: 2 * (H + Hkv) * D * sizeof(T) a token, and R/2 of each table.
#include "rope/rope_cuda.h"

#include "common/launch.cuh"

namespace pyllm {
namespace {

constexpr int kMostThreads = 256;

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

// One unit of one head, from x to out.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void turn(const T* x, T* out, int unit, int half, const Angles<V>& angles) {
  const int first = kInterleaved ? 2 * unit * V : unit * V, second = kInterleaved ? first + V : half + first;
  const auto u = Vec<T, V>::load(x + first), v = Vec<T, V>::load(x + second);
  float of_u[V], of_v[V];
#pragma unroll
  for (int j = 0; j < V; j++) {
    // Pair j: elements j of the two vectors, or elements 2j and 2j + 1 of the two laid end to end.
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
  Vec<T, V>::round(of_u).store(out + first);
  Vec<T, V>::round(of_v).store(out + second);
}

// All heads of one token of q or of k.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void turn_heads(const T* x, T* out, int heads, int64_t head_stride, int D, int R,
                                           const float* cos, const float* sin, bool vectors, float sign) {
  const int half = R / 2;
  for (int unit = threadIdx.x; unit < half / V; unit += blockDim.x) {
    Angles<V> angles;
    angles.load(cos + unit * V, sin + unit * V, vectors, sign);
    for (int head = threadIdx.y; head < heads; head += blockDim.y)
      turn<T, V, kInterleaved>(x + head * head_stride, out + int64_t(head) * D, unit, half, angles);
  }
  for (int i = R + threadIdx.x * V; i < D; i += blockDim.x * V)
    for (int head = threadIdx.y; head < heads; head += blockDim.y)
      Vec<T, V>::load(x + head * head_stride + i).store(out + int64_t(head) * D + i);
}

// Grid: a block per token.
template <class T, int V, bool kInterleaved>
__global__ void __launch_bounds__(kMostThreads) rope_kernel(
    const T* __restrict__ q, const T* __restrict__ k, T* __restrict__ q_out, T* __restrict__ k_out,
    const float* __restrict__ cos, const float* __restrict__ sin, const int64_t* __restrict__ positions, int64_t T_,
    int H, int Hkv, int D, int R, int64_t table_rows, longlong3 q_stride, longlong3 k_stride, longlong2 cos_stride,
    longlong2 sin_stride, bool vectors, float sign) {
  const int64_t token = blockIdx.x, b = token / T_, t = token % T_;
  int64_t row = positions ? positions[token] : t;
  // A position outside the table is a bug of the caller; the nearest row is a wrong angle, but memory that is ours.
  row = row < 0 ? 0 : row < table_rows ? row : table_rows - 1;
  cos += b * cos_stride.x + row * cos_stride.y;
  sin += b * sin_stride.x + row * sin_stride.y;
  turn_heads<T, V, kInterleaved>(q + b * q_stride.x + t * q_stride.y, q_out + token * H * D, H, q_stride.z, D, R, cos,
                                 sin, vectors, sign);
  turn_heads<T, V, kInterleaved>(k + b * k_stride.x + t * k_stride.y, k_out + token * Hkv * D, Hkv, k_stride.z, D, R,
                                 cos, sin, vectors, sign);
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int V, bool kInterleaved>
int rotate(const Rope& a, bool vectors, void* stream) {
  const int64_t tokens = a.B * a.T, units = a.R / 2 / V, rest = (a.D - a.R) / V;
  if (tokens > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const int64_t wanted = units > rest ? units : rest;
  unsigned width = 1;
  while (width < wanted && width < kMostThreads) width *= 2;
  // Few heads per thread, so that many are in flight, but more than one: they share the angles.
  const int64_t heads = a.H > a.Hkv ? a.H : a.Hkv;
  unsigned groups = 1;
  while (groups * width < kMostThreads && int64_t(groups) * 2 < heads) groups *= 2;
  return launch(rope_kernel<T, V, kInterleaved>, dim3(unsigned(tokens)), dim3(width, groups), stream,
                static_cast<const T*>(a.q), static_cast<const T*>(a.k), static_cast<T*>(a.q_out),
                static_cast<T*>(a.k_out), a.cos, a.sin, a.positions, a.T, int(a.H), int(a.Hkv), int(a.D), int(a.R),
                a.table_rows, longlong3{a.q_stride[0], a.q_stride[1], a.q_stride[2]},
                longlong3{a.k_stride[0], a.k_stride[1], a.k_stride[2]}, longlong2{a.cos_stride[0], a.cos_stride[1]},
                longlong2{a.sin_stride[0], a.sin_stride[1]}, vectors, a.conjugate ? -1.f : 1.f);
}

template <class T, int V>
bool heads_fit(const void* first, const int64_t (&stride)[3]) {
  return vectors_fit<T, V>(static_cast<const T*>(first), stride[2]) && stride[0] % V == 0 && stride[1] % V == 0;
}

template <class T>
int by_alignment(const Rope& a, void* stream) {
  constexpr int V = vector_length<T>();
  const bool fit = a.R / 2 % V == 0 && a.D % V == 0 && heads_fit<T, V>(a.q, a.q_stride) &&
                   heads_fit<T, V>(a.k, a.k_stride) && vectors_fit<T, V>(static_cast<T*>(a.q_out), 0) &&
                   vectors_fit<T, V>(static_cast<T*>(a.k_out), 0);
  const bool vectors = vectors_fit<float, 4>(a.cos, a.cos_stride[0]) && a.cos_stride[1] % 4 == 0 &&
                       vectors_fit<float, 4>(a.sin, a.sin_stride[0]) && a.sin_stride[1] % 4 == 0;
  if (fit && a.interleaved) return rotate<T, V, true>(a, vectors, stream);
  if (fit) return rotate<T, V, false>(a, vectors, stream);
  if (a.interleaved) return rotate<T, 1, true>(a, false, stream);
  return rotate<T, 1, false>(a, false, stream);
}

}  // namespace

int rope(const Rope& a, void* stream) {
  if (a.B == 0 || a.T == 0 || a.D == 0 || (a.H == 0 && a.Hkv == 0)) return 0;
  return dispatch(a.dtype, [&](auto t) { return by_alignment<typename decltype(t)::type>(a, stream); });
}

}  // namespace pyllm
