// Rotary position embedding, q and k in one launch. Pair i of a head's first R of D elements turns by its token's angle:
//
//   a' = a cos - b sin      b' = b cos + a sin          the rest of the head is copied
//
// Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved. Turning the other way (`conjugate`) is the inverse, and so
// the gradient: rotations are orthogonal.
//
// A block has one token: all heads of q, then of k (turn.cuh).
//
// Bytes, the floor: 2 * (H + Hkv) * D * sizeof(T) a token, and R/2 of each table.
#include "rope/rope_cuda.h"

#include "common/launch.cuh"
#include "rope/turn.cuh"

namespace pyllm {
namespace {

// Grid: a block per token.
template <class T, int V, bool kInterleaved>
__global__ void __launch_bounds__(kMostTurnThreads) rope_kernel(
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
  turn_heads<T, V, kInterleaved>(q + b * q_stride.x + t * q_stride.y, q_stride.z, q_out + token * H * D, D, 1, H, D, R,
                                 cos, sin, vectors, sign);
  turn_heads<T, V, kInterleaved>(k + b * k_stride.x + t * k_stride.y, k_stride.z, k_out + token * Hkv * D, D, 1, Hkv, D, R,
                                 cos, sin, vectors, sign);
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int V, bool kInterleaved>
int rotate(const Rope& a, bool vectors, void* stream) {
  const int64_t tokens = a.B * a.T;
  if (tokens > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const TurnBlock block(a.D, a.R, V, a.H > a.Hkv ? a.H : a.Hkv);
  return launch(rope_kernel<T, V, kInterleaved>, dim3(unsigned(tokens)), dim3(block.width, block.groups), stream,
                static_cast<const T*>(a.q), static_cast<const T*>(a.k), static_cast<T*>(a.q_out),
                static_cast<T*>(a.k_out), a.cos, a.sin, a.positions, a.T, int(a.H), int(a.Hkv), int(a.D), int(a.R),
                a.table_rows, longlong3{a.q_stride[0], a.q_stride[1], a.q_stride[2]},
                longlong3{a.k_stride[0], a.k_stride[1], a.k_stride[2]}, longlong2{a.cos_stride[0], a.cos_stride[1]},
                longlong2{a.sin_stride[0], a.sin_stride[1]}, vectors, a.conjugate ? -1.f : 1.f);
}

template <class T>
int by_alignment(const Rope& a, void* stream) {
  constexpr int V = vector_length<T>();
  const bool fit = a.R / 2 % V == 0 && a.D % V == 0 && heads_fit<T, V>(a.q, a.q_stride) &&
                   heads_fit<T, V>(a.k, a.k_stride) && vectors_fit<T, V>(static_cast<T*>(a.q_out), 0) &&
                   vectors_fit<T, V>(static_cast<T*>(a.k_out), 0);
  const bool vectors = tables_fit(a.cos, a.cos_stride) && tables_fit(a.sin, a.sin_stride);
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
