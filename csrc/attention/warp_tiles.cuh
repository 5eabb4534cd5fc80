// What the attention kernels do with tiles: fetch them, multiply them warp by warp, store results through them.
#pragma once
#include "attention/sequences.cuh"
#include "attention/softmax.cuh"
#include "common/mma.cuh"

namespace pyllm {

// May rows of heads be moved as vectors of 16 bytes?
template <class T>
bool heads_are_vectors(const void* first, const AttentionStride& stride, int64_t D) {
  constexpr int V = kVectorBytes / sizeof(T);
  return reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0 && stride.batch % V == 0 && stride.row % V == 0 &&
         stride.head % V == 0 && D % V == 0;
}

// body(columns of the tiles) for heads of D elements: the next of 64, 96 (of halves: floats take long to compile), 128 and
// 256, padded with zeros in shared memory.
template <class T, class Body>
int by_head_dim(int64_t D, const Body& body) {
  if (D <= 64) return body(std::integral_constant<int, 64>());
  if constexpr (sizeof(T) == 2)
    if (D <= 96) return body(std::integral_constant<int, 96>());
  if (D <= 128) return body(std::integral_constant<int, 128>());
  if (D <= 256) return body(std::integral_constant<int, 256>());
  return int(cudaErrorInvalidValue);
}

// Rows first + r * stride, as long as r < count.
template <class T>
struct RowsOf {
  const T* first;
  int64_t stride;
  int count;
  __device__ __forceinline__ const T* operator()(int r) const { return r < count ? first + r * stride : nullptr; }
};

// kRows rows into a tile by kThreads threads: row r from row_at(r), null for a row of zeros; its first D columns, zeros
// after them. With vectors the copies are cp.async's and still to be waited for.
template <int kRows, int kThreads, class T, int C, class RowAt>
__device__ __forceinline__ void fetch_tile(const Tile<T, C>& tile, const RowAt& row_at, int D, bool vectors, int thread) {
  constexpr int V = Tile<T, C>::kPerChunk, kChunks = Tile<T, C>::kChunks;
  if constexpr (std::is_same_v<RowAt, RowsOf<T>> && kThreads % kChunks == 0) {
    if (vectors) {  // a thread has one column of chunks, so that a pointer and a comparison are all it needs for each
      constexpr int kStep = kThreads / kChunks;
      const int c = thread % kChunks, first = thread / kChunks;
      const int64_t step = kStep * row_at.stride;
      const int count = c * V < D ? row_at.count : 0;
      const T* from = row_at.first + first * row_at.stride + c * V;
#pragma unroll
      for (int k = 0; k < kRows / kStep; k++, from += step)
        cp_async16(tile.chunk(first + k * kStep, c), from, first + k * kStep < count);
      return;
    }
  }
  if (vectors) {
#pragma unroll 2
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks;
      const T* row = row_at(r);
      cp_async16(tile.chunk(r, c), row + c * V, row != nullptr && c * V < D);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks;
      const T* row = row_at(r);
      float x[V];
#pragma unroll
      for (int j = 0; j < V; j++) {
        const bool there = row != nullptr && c * V + j < D;
        x[j] = there ? Vec<T, 1>::load(row + c * V + j)[0] : 0.f;
      }
      *reinterpret_cast<Vec<T, V>*>(tile.chunk(r, c)) = Vec<T, V>::round(x);  // exact: they come from T
    }
  }
}

// s[m] += 16 rows of `a`, from row + 16 m on, times 8 N rows of `b`, from its first on.
template <int M, int N, class T, int C>
__device__ __forceinline__ void multiply_rows(float (&s)[M][N][4], const Tile<T, C>& a, int row, const Tile<T, C>& b) {
  // Not all steps at once: that would make the compiler slow, and it would keep all their addresses.
#pragma unroll 2
  for (int step = 0; step < C / kDepth<T>; step++) {
    uint32_t of_a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) load_a(of_a[m], a, row + 16 * m, step);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t of_b[4];
      load_b_rows(of_b, b, 8 * n, step);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(s[m][n], of_a[m], of_b[0], of_b[1]);
        mma<T>(s[m][n + 1], of_a[m], of_b[2], of_b[3]);
      }
    }
  }
}

// -inf for what a query doesn't see; s[m] are the scores of queries from `row0` + 16 m on and keys from `column0` on, or
// the other way round.
template <bool kOfKeys = false, int M, int N>
__device__ __forceinline__ void hide_unseen(float (&s)[M][N][4], const Span& span, int row0, int column0) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = row0 + 16 * m + g + 8 * i;
      const int first = (kOfKeys ? span.first_query(row) : span.first_key(row)) - column0;
      const int past = (kOfKeys ? span.end_query(row) : span.end_key(row)) - column0;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int column = 8 * n + 2 * t + e;
          if (column < first || column >= past) s[m][n][2 * i + e] = -kInfinity;
        }
    }
}

// acc[m] += p[m], rounded to T, times the 8 N rows of `b`.
template <int M, int N, class T, int C>
__device__ __forceinline__ void multiply_columns(float (&acc)[M][C / 8][4], const float (&p)[M][N][4],
                                                 const Tile<T, C>& b) {
#pragma unroll
  for (int step = 0; step < 8 * N / kDepth<T>; step++) {
    uint32_t of_p[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) a_of_products<T>(of_p[m], p[m], step);
#pragma unroll
    for (int c = 0; c < C / 8; c += 2) {
      uint32_t of_b[4];
      load_b_columns(of_b, b, step * kDepth<T>, 8 * c);
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma<T>(acc[m][c], of_p[m], of_b[0], of_b[1]);
        mma<T>(acc[m][c + 1], of_p[m], of_b[2], of_b[3]);
      }
    }
  }
}

// 16 M rows of results, times factor[m][i] for row 16 m + g + 8 i, by way of the tile's rows from `row` on, which nobody
// but this warp uses any more. out: of the first of these rows; `count` of them exist, with D columns.
template <int M, class T, int C>
__device__ __forceinline__ void store_rows(const float (&acc)[M][C / 8][4], const float (&factor)[M][2],
                                           const Tile<T, C>& tile, int row, T* out, int64_t stride, int count, int D,
                                           bool vectors) {
  constexpr int V = Tile<T, C>::kPerChunk, kChunks = Tile<T, C>::kChunks;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int c = 0; c < C / 8; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float lo = acc[m][c][2 * i] * factor[m][i], hi = acc[m][c][2 * i + 1] * factor[m][i];
        T* to = tile.element(row + 16 * m + g + 8 * i, 8 * c + 2 * t);
        if constexpr (sizeof(T) == 2) *reinterpret_cast<uint32_t*>(to) = pack<T>(lo, hi);
        else *reinterpret_cast<float2*>(to) = float2{lo, hi};
      }
  __syncwarp();
  for (int i = lane; i < 16 * M * kChunks; i += kWarp) {
    const int r = i / kChunks, c = i % kChunks;
    if (r >= count) break;
    const T* from = tile.chunk(row + r, c);
    T* to = out + r * stride + c * V;
    if (vectors) {
      if (c * V < D) Vec<T, V>::load(from).store(to);
    } else {
      for (int j = 0; j < V && c * V + j < D; j++) Vec<T, 1>::load(from + j).store(to + j);
    }
  }
}

}  // namespace pyllm
