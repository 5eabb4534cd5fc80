// Attention of the newest tokens to a cache of keys and values, plain or paged.
//
// Bound by reading the cache: every byte is read once for all H / Hkv heads of its group, which are packed with the T
// tokens into tiles of 16 rows, one mma's worth. To have many bytes on their way, each warp walks over keys of its own,
// 16 at a time, with kStages of them in flight and no barrier between warps; and the keys of a sequence are split
// over blocks, whose results a second kernel joins (Dao et al. 2023, Flash-Decoding).
//
// Floor: 2 * (visible keys) * Hkv * D * sizeof(T) bytes a sequence.
#pragma once
#include "attention/softmax.cuh"
#include "attention/warp_tiles.cuh"
#include "common/launch.cuh"

namespace pyllm {

// 64 KB of shared memory: three blocks on a multiprocessor of sm_90 and sm_100, two on sm_80, one on sm_86 and sm_120.
template <class T, int C>
struct DecodeTiles {
  static constexpr int kKeys = 16, kPair = Tile<T, C>::bytes(2 * kKeys);  // bytes of keys and of values
  static constexpr int kWarps = 4 * kPair <= 32 << 10 ? 4 : 2 * kPair <= 32 << 10 ? 2 : 1;
  static constexpr int kStages = (64 << 10) / (kWarps * kPair) < 4 ? (64 << 10) / (kWarps * kPair) : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kQueries = Tile<T, C>::bytes(16), kShared = kQueries + kWarps * kStages * kPair;
  static_assert(kWarps * 16 * (C + 2) * 4 <= kWarps * kStages * kPair, "the warps' results lie where the keys lay");
};

// Grid: (16-row tiles * Hkv * B, splits).
template <class T, int C>
__global__ void __launch_bounds__(DecodeTiles<T, C>::kThreads, 3)
    attention_decode_kernel(const __grid_constant__ AttentionDecode a, bool q_vectors, bool vectors) {
  using Shape = DecodeTiles<T, C>;
  constexpr int kKeys = Shape::kKeys, kWarps = Shape::kWarps, kStages = Shape::kStages, kThreads = Shape::kThreads;
  SHARED_DYNAMIC(shared);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int D = int(a.D), tokens = int(a.T), group = int(a.H / a.Hkv), rows = tokens * group;
  const int tiles = int(ceil_div(rows, 16));
  const int tile = int(blockIdx.x % tiles), kv_head = int(blockIdx.x / tiles % a.Hkv);
  const int64_t batch = blockIdx.x / tiles / a.Hkv;
  const int split = blockIdx.y;

  // A length beyond the cache is a bug of the caller, and cut.
  const int64_t capacity = a.block_table ? a.table_width * a.S : a.S;
  const int64_t length = a.lengths_are_32_bits ? static_cast<const int32_t*>(a.lengths)[batch]
                                               : static_cast<const int64_t*>(a.lengths)[batch];
  const Span span = {tokens, clamp(length, 0, capacity), clamp(a.left, -1, 1 << 30), 0};

  // Row r of the tile is head r % group of token r / group, both counted from the first row.
  const int row0 = tile * 16, last = min(row0 + 16, rows) - 1;
  const T* q = static_cast<const T*>(a.q) + batch * a.q_stride.batch + int64_t(kv_head) * group * a.q_stride.head;
  const Tile<T, C> of_q{shared};
  auto query_row = [&](int r) {
    const int row = row0 + r;
    return row < rows ? q + row / group * a.q_stride.row + row % group * a.q_stride.head : nullptr;
  };
  fetch_tile<16, kThreads>(of_q, query_row, D, q_vectors, thread);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  // Keys that some row sees, in chunks; this split's share of them, and every kWarps-th of that for this warp.
  const int first = span.first_key(row0 / group), end = span.end_key(last / group);
  const int chunks = int(ceil_div(max(0, end - first), kKeys)), share = int(ceil_div(chunks, a.splits));
  const int past = min(chunks, (split + 1) * share);
  unsigned char* const mine = shared + Shape::kQueries + warp * kStages * Shape::kPair;
  auto of_k = [&](int stage) { return Tile<T, C>{mine + stage * Shape::kPair}; };
  auto of_v = [&](int stage) { return Tile<T, C>{mine + stage * Shape::kPair + Shape::kPair / 2}; };
  auto fetch = [&](int chunk, int stage) {
    if (chunk < past) {
      const int key0 = first + chunk * kKeys;
      if (!a.block_table) {
        auto rows_of = [&](const void* cache, const AttentionStride& stride) {
          return RowsOf<T>{static_cast<const T*>(cache) + batch * stride.batch + key0 * stride.row + kv_head * stride.head,
                           stride.row, end - key0};
        };
        fetch_tile<kKeys, kWarp>(of_k(stage), rows_of(a.k, a.k_stride), D, vectors, lane);
        fetch_tile<kKeys, kWarp>(of_v(stage), rows_of(a.v, a.v_stride), D, vectors, lane);
        cp_async_commit();
        return;
      }
      auto cache_row = [&](const void* cache, const AttentionStride& stride, int r) -> const T* {
        const int key = key0 + r;
        if (key >= end) return nullptr;
        const T* head = static_cast<const T*>(cache) + kv_head * stride.head;
        const int block = a.block_table[batch * a.table_stride + key / a.S];
        if (block < 0 || block >= a.blocks) return nullptr;  // a bug of the caller: zeros, but no foreign memory
        return head + block * stride.batch + key % a.S * stride.row;
      };
      auto key_row = [&](int r) { return cache_row(a.k, a.k_stride, r); };
      auto value_row = [&](int r) { return cache_row(a.v, a.v_stride, r); };
      fetch_tile<kKeys, kWarp>(of_k(stage), key_row, D, vectors, lane);
      fetch_tile<kKeys, kWarp>(of_v(stage), value_row, D, vectors, lane);
    }
    cp_async_commit();
  };

  const Score score(a.scale, a.softcap);
  Softmax<1> softmax;
  float acc[1][C / 8][4] = {};
  int next = split * share + warp;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; stage++) fetch(next + stage * kWarps, stage);
  for (int stage = 0; next < past; next += kWarps, stage = (stage + 1) % kStages) {
    fetch(next + (kStages - 1) * kWarps, (stage + kStages - 1) % kStages);
    cp_async_wait<kStages - 1>();
    __syncwarp();
    float s[1][kKeys / 8][4] = {};
    multiply_rows(s, of_q, 0, of_k(stage));
    score.of(s);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = (row0 + g + 8 * i) / group, key0 = first + next * kKeys;
      const int from = span.first_key(token) - key0, to = span.end_key(token) - key0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * n + 2 * t + e < from || 8 * n + 2 * t + e >= to) s[0][n][2 * i + e] = -kInfinity;
    }
    float fade[1][2];
    softmax.step(s, fade, score.unit);
    softmax.rescale(acc, fade);
    multiply_columns(acc, s, of_v(stage));
    __syncwarp();  // the stage may be filled again
  }
  cp_async_wait<0>();
  __syncthreads();

  // The warps' results, one below the other: products, then factors' and lses' places.
  float factor[1][2], lse[1][2];
  softmax.finish(-kInfinity, score.unit, factor, lse);
  float* const products = reinterpret_cast<float*>(shared + Shape::kQueries);
  float* const lses = products + kWarps * 16 * C;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = warp * 16 + g + 8 * i;
    if (t == 0) lses[r] = lse[0][i];
#pragma unroll
    for (int c = 0; c < C / 8; c++)
      *reinterpret_cast<float2*>(products + r * C + 8 * c + 2 * t) =
          float2{acc[0][c][2 * i] * factor[0][i], acc[0][c][2 * i + 1] * factor[0][i]};
  }
  __syncthreads();
  for (int i = thread; i < 16 * C; i += kThreads) {
    const int r = i / C, col = i % C, row = row0 + r;
    if (row >= rows || col >= D) continue;
    float top = -kInfinity, total = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) top = fmaxf(top, lses[w * 16 + r]);
    const float base = top == -kInfinity ? 0.f : top;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float weight = exp2_fast(lses[w * 16 + r] - base);
      total += weight;
      sum += weight * products[(w * 16 + r) * C + col];
    }
    const int64_t to = (batch * tokens + row / group) * a.H + kv_head * group + row % group;
    const float x[1] = {total > 0.f ? sum / total : 0.f};
    if (a.splits == 1) {
      Vec<T, 1>::round(x).store(static_cast<T*>(a.out) + to * D + col);
    } else {
      const int64_t part = split * (a.B * tokens * a.H) + to;
      a.part[part * D + col] = x[0];
      if (col == 0) a.part_lse[part] = total > 0.f ? base + log2f(total) : -kInfinity;
    }
  }
}

// Joins the splits, a warp a row of out.
template <class T>
__global__ void __launch_bounds__(128)
    attention_join_kernel(const float* __restrict__ part, const float* __restrict__ part_lse, T* __restrict__ out,
                          int64_t rows, int splits, int D) {
  const int64_t row = blockIdx.x * int64_t(4) + threadIdx.x / kWarp;
  if (row >= rows) return;
  float top = -kInfinity;
  for (int s = 0; s < splits; s++) top = fmaxf(top, part_lse[s * rows + row]);
  const float base = top == -kInfinity ? 0.f : top;
  for (int col = threadIdx.x % kWarp; col < D; col += kWarp) {
    float total = 0.f, sum = 0.f;
    for (int s = 0; s < splits; s++) {
      const float weight = exp2_fast(part_lse[s * rows + row] - base);
      total += weight;
      sum += weight * part[(s * rows + row) * D + col];
    }
    const float x[1] = {total > 0.f ? sum / total : 0.f};
    Vec<T, 1>::round(x).store(out + row * D + col);
  }
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int C>
int attention_decode_tiles(const AttentionDecode& a, void* stream) {
  using Shape = DecodeTiles<T, C>;
  const int64_t blocks = ceil_div(a.T * (a.H / a.Hkv), 16) * a.Hkv * a.B;
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const bool vectors = heads_are_vectors<T>(a.k, a.k_stride, a.D) && heads_are_vectors<T>(a.v, a.v_stride, a.D);
  return launch_shared(attention_decode_kernel<T, C>, dim3(unsigned(blocks), unsigned(a.splits)), dim3(Shape::kThreads),
                       Shape::kShared, stream, a, heads_are_vectors<T>(a.q, a.q_stride, a.D), vectors);
}

template <class T>
int attention_decode_tiled(const AttentionDecode& a, void* stream) {
  int error =
      by_head_dim<T>(a.D, [&](auto C) { return attention_decode_tiles<T, decltype(C)::value>(a, stream); });
  const int64_t rows = a.B * a.T * a.H, blocks = ceil_div(rows, 4);
  if (error != 0 || a.splits == 1) return error;
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  return launch(attention_join_kernel<T>, dim3(unsigned(blocks)), dim3(128), stream, a.part, a.part_lse,
                static_cast<T*>(a.out), rows, int(a.splits), int(a.D));
}

}  // namespace pyllm
