// New tokens on their way into the cache, in one launch: q is turned by its token's angle, k is turned and put into the
// cache, v is put there as it is. Token t of sequence b is at position lengths[b] - T + t, which is read on the device,
// so that a CUDA graph serves every step. A token outside the cache goes nowhere.
//
// Bytes, the floor: 2 * (H + 2 Hkv) * D * sizeof(T) a token, and R/2 of each table.
#include "rope/rope_append_cuda.h"

#include "common/launch.cuh"
#include "rope/turn.cuh"

namespace pyllm {
namespace {

template <class T>
__device__ __forceinline__ const T* token_of(const void* x, const int64_t (&stride)[3], int64_t b, int64_t t) {
  return static_cast<const T*>(x) + b * stride[0] + t * stride[1];
}

// Grid: a block per token (turn.cuh).
template <class T, int V, bool kInterleaved>
__global__ void __launch_bounds__(kMostTurnThreads, 4)
    rope_append_kernel(const __grid_constant__ RopeAppend a, bool vectors) {
  const int64_t token = blockIdx.x, b = token / a.T, t = token % a.T, position = a.lengths[b] - a.T + t;
  const int64_t row = position < 0 ? 0 : position < a.table_rows ? position : a.table_rows - 1;
  const float* cos = a.cos + row * a.cos_stride;
  const float* sin = a.sin + row * a.sin_stride;
  const int D = int(a.D), R = int(a.R), H = int(a.H), Hkv = int(a.Hkv);
  turn_heads<T, V, kInterleaved>(token_of<T>(a.q, a.q_stride, b, t), a.q_stride[2],
                                 static_cast<T*>(a.q_out) + token * H * D, D, 1, H, D, R, cos, sin, vectors, 1.f);

  int64_t place = position, major = b;
  bool placed = position >= 0 && position < (a.block_table ? a.table_width * a.S : a.S);
  if (a.block_table && placed) {
    major = a.block_table[b * a.table_stride + position / a.S];
    place = position % a.S;
    placed = major >= 0 && major < a.blocks;
  }
  if (!placed) return;
  T* k_to = static_cast<T*>(a.k_cache) + major * a.k_cache_stride[0] + place * a.k_cache_stride[1];
  T* v_to = static_cast<T*>(a.v_cache) + major * a.v_cache_stride[0] + place * a.v_cache_stride[1];
  turn_heads<T, V, kInterleaved>(token_of<T>(a.k, a.k_stride, b, t), a.k_stride[2], k_to, a.k_cache_stride[2],
                                 a.k_cache_step, Hkv, D, R, cos, sin, vectors, 1.f);
  turn_heads<T, V, kInterleaved>(token_of<T>(a.v, a.v_stride, b, t), a.v_stride[2], v_to, a.v_cache_stride[2],
                                 a.v_cache_step, Hkv, D, 0, cos, sin, vectors, 1.f);
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int V, bool kInterleaved>
int append(const RopeAppend& a, bool vectors, void* stream) {
  const int64_t tokens = a.B * a.T;
  if (tokens > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const TurnBlock block(a.D, a.R, V, a.H > a.Hkv ? a.H : a.Hkv);
  return launch(rope_append_kernel<T, V, kInterleaved>, dim3(unsigned(tokens)), dim3(block.width, block.groups), stream,
                a, vectors);
}

template <class T>
int by_alignment(const RopeAppend& a, void* stream) {
  constexpr int V = vector_length<T>();
  const bool fit = a.R / 2 % V == 0 && a.D % V == 0 && heads_fit<T, V>(a.q, a.q_stride) &&
                   heads_fit<T, V>(a.k, a.k_stride) && heads_fit<T, V>(a.v, a.v_stride) &&
                   heads_fit<T, V>(a.k_cache, a.k_cache_stride) && heads_fit<T, V>(a.v_cache, a.v_cache_stride) &&
                   vectors_fit<T, V>(static_cast<T*>(a.q_out), 0) && a.k_cache_step == 1 && a.v_cache_step == 1;
  const bool vectors = tables_fit(a.cos, {a.cos_stride, 0}) && tables_fit(a.sin, {a.sin_stride, 0});
  if (fit && a.interleaved) return append<T, V, true>(a, vectors, stream);
  if (fit) return append<T, V, false>(a, vectors, stream);
  if (a.interleaved) return append<T, 1, true>(a, false, stream);
  return append<T, 1, false>(a, false, stream);
}

}  // namespace

int rope_append(const RopeAppend& a, void* stream) {
  if (a.B == 0 || a.T == 0 || a.D == 0 || (a.H == 0 && a.Hkv == 0)) return 0;
  return dispatch(a.dtype, [&](auto t) { return by_alignment<typename decltype(t)::type>(a, stream); });
}

}  // namespace pyllm
