// Attention forward by tiles, for tensor cores of sm_80 and later. Every score is used where it is computed, in registers:
// nothing of T x S goes to memory (Dao 2023, arXiv:2307.08691).
//
// A block has 16 M kWarps queries of one head and walks over the tiles of keys they see. K and V have one buffer each:
// V comes while Q K^T is multiplied, the next K while P V is. Other blocks on the same multiprocessor fill the waits.
//
// Floor: 4 D operations a visible pair of query and key; q, k, v read and out written once where the cache (L2) holds the
// keys of a group of heads.
#pragma once
#include "attention/softmax.cuh"
#include "attention/warp_tiles.cuh"
#include "common/launch.cuh"

namespace pyllm {

// Chosen for 255 registers and 99 KB of shared memory, which sm_86, sm_89 and sm_120 have: q, one tile of k and one of v.
template <class T, int C>
struct ForwardTiles {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kWarps = 4, kM = kHalf && C <= 128 ? 2 : 1;
  static constexpr int kKeys = C == 256 ? (kHalf ? 32 : 16) : C == 64 || kHalf ? 64 : 32;
  static constexpr int kThreads = kWarps * kWarp, kRows = 16 * kM * kWarps;
  static constexpr int kShared = Tile<T, C>::bytes(kRows + 2 * kKeys);
};

template <class T, int C>
__global__ void __launch_bounds__(ForwardTiles<T, C>::kThreads, 2)
    attention_fwd_kernel(const __grid_constant__ Attention a, bool vectors, bool out_vectors) {
  using Shape = ForwardTiles<T, C>;
  constexpr int M = Shape::kM, N = Shape::kKeys / 8, kThreads = Shape::kThreads, kKeys = Shape::kKeys;
  SHARED_DYNAMIC(shared);
  const Tile<T, C> of_q{shared}, of_k{shared + Tile<T, C>::bytes(Shape::kRows)};
  const Tile<T, C> of_v{of_k.first + Tile<T, C>::bytes(kKeys)};

  const Place at = find_place<Shape::kRows, false>(a, int(a.H));
  const Span& span = at.span;
  const int D = int(a.D), thread = threadIdx.x;
  const int rows = min(Shape::kRows, span.T - at.row);
  if (rows <= 0) return;
  const int kv_head = int(at.head / (a.H / a.Hkv));
  const T* q = head_of(static_cast<const T*>(a.q), a.q_stride, at, at.q_row0 + at.row, at.head);
  const T* k = head_of(static_cast<const T*>(a.k), a.k_stride, at, at.k_row0, kv_head);
  const T* v = head_of(static_cast<const T*>(a.v), a.v_stride, at, at.k_row0, kv_head);

  const int begin = span.first_key(at.row) / kKeys * kKeys, end = span.end_key(at.row + rows - 1);
  auto fetch_keys = [&](const Tile<T, C>& tile, const T* first, int64_t stride, int j) {
    const RowsOf<T> keys{first + j * stride, stride, span.S - j};
    fetch_tile<kKeys, kThreads>(tile, keys, D, vectors, thread);
    cp_async_commit();
  };
  fetch_tile<Shape::kRows, kThreads>(of_q, RowsOf<T>{q, a.q_stride.row, rows}, D, vectors, thread);
  cp_async_commit();  // or nobody would wait for q where there are no keys
  if (begin < end) fetch_keys(of_k, k, a.k_stride.row, begin);

  const int row = thread / kWarp * 16 * M, g = thread % kWarp / 4, t = thread % 4;
  const Score score(a.scale, a.softcap);
  Softmax<M> softmax;
  float acc[M][C / 8][4] = {};
  for (int j = begin; j < end; j += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // k is here, and nobody reads the last v any more
    fetch_keys(of_v, v, a.v_stride.row, j);
    float s[M][N][4] = {};
    multiply_rows(s, of_q, row, of_k);
    score.of(s);
    if (!span.all_see(at.row, at.row + rows - 1, j, j + kKeys - 1)) hide_unseen(s, span, at.row + row, j);
    float fade[M][2];
    softmax.step(s, fade, score.unit);
    softmax.rescale(acc, fade);
    cp_async_wait<0>();
    __syncthreads();  // v is here, and nobody reads this k any more
    if (j + kKeys < end) fetch_keys(of_k, k, a.k_stride.row, j + kKeys);
    multiply_columns(acc, s, of_v);
  }
  cp_async_wait<0>();  // q's, when there was no key
  __syncthreads();

  float factor[M][2], lse[M][2];
  softmax.finish(a.sinks ? a.sinks[at.head] * kLog2e : -kInfinity, score.unit, factor, lse);
  float* to = a.lse + lse_offset(a, at, at.head) + at.row;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (t == 0 && row + 16 * m + g + 8 * i < rows) to[row + 16 * m + g + 8 * i] = lse[m][i] * kLn2;
  const AttentionStride dense = {a.T * a.H * D, a.H * D, D};
  T* out = head_of(static_cast<T*>(a.out), dense, at, at.q_row0 + at.row + row, at.head);
  store_rows<M>(acc, factor, of_q, row, out, dense.row, rows - row, D, out_vectors);
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int C>
int attention_fwd_tiles(const Attention& a, void* stream) {
  using Shape = ForwardTiles<T, C>;
  const int64_t blocks = blocks_for(a, Shape::kRows, a.H, false);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const bool vectors = heads_are_vectors<T>(a.q, a.q_stride, a.D) && heads_are_vectors<T>(a.k, a.k_stride, a.D) &&
                       heads_are_vectors<T>(a.v, a.v_stride, a.D);
  return launch_shared(attention_fwd_kernel<T, C>, dim3(unsigned(blocks)), dim3(Shape::kThreads), Shape::kShared, stream,
                       a, vectors, heads_are_vectors<T>(a.out, {}, a.D));
}

template <class T>
int attention_fwd_tiled(const Attention& a, void* stream) {
  return by_head_dim<T>(a.D, [&](auto C) { return attention_fwd_tiles<T, decltype(C)::value>(a, stream); });
}

}  // namespace pyllm
