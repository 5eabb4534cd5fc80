// Which rows a block of threads works on, and which keys its queries see.
#pragma once
#include "attention/attention_cuda.h"
#include "common/device.cuh"

namespace pyllm {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__device__ __forceinline__ int clamp(int64_t x, int64_t low, int64_t high) {
  return int(x < low ? low : x > high ? high : x);
}

// T queries and S keys of one sequence: query i sees key j when i' - left <= j <= i' + right, i' = i + S - T.
struct Span {
  int T, S, left, right;

  __device__ __forceinline__ int first_key(int i) const { return left < 0 ? 0 : clamp(int64_t(i) + S - T - left, 0, S); }
  __device__ __forceinline__ int end_key(int i) const {
    return right < 0 ? S : clamp(int64_t(i) + S - T + right + 1, 0, S);
  }
  __device__ __forceinline__ bool sees(int i, int j) const { return j >= first_key(i) && j < end_key(i); }
  // The queries that see key j: first, and one past the last.
  __device__ __forceinline__ int first_query(int j) const {
    return right < 0 ? 0 : clamp(int64_t(j) - S + T - right, 0, T);
  }
  __device__ __forceinline__ int end_query(int j) const {
    return left < 0 ? T : clamp(int64_t(j) - S + T + left + 1, 0, T);
  }
  // Does every query from i to `last_i` see every key from j to `last_j`?
  __device__ __forceinline__ bool all_see(int i, int last_i, int j, int last_j) const {
    return first_key(last_i) <= j && last_j < end_key(i);
  }
};

// A block's place in the batch. Rows of sequence b begin at row q_row0 (k_row0) of batch `batch`.
struct Place {
  int batch, head, row;  // row: first of the block's, within its sequence; past the end when it has nothing to do
  int q_row0, k_row0;
  Span span;
};

// The grid has `heads` blocks for every `rows` rows of every sequence, heads next to each other: those that read the same
// keys run together. Of a causal sequence the last rows have most to do and come first.
//
// Of packed sequences the host knows only how many there are and their rows in all. Sequence b has tiles
// cu[b] / rows + b and on, which leaves room for each sequence's last, ragged tile. What follows the last sequence is a
// sequence of its own, with nobody to see.
inline int64_t blocks_for(const Attention& a, int64_t rows, int64_t heads, bool of_keys) {
  const int64_t n = of_keys ? a.S : a.T;
  return heads * (a.cu_q ? n / rows + a.B + 1 : a.B * ceil_div(n, rows));
}

template <int kRows, bool kOfKeys>
__device__ __forceinline__ Place find_place(const Attention& a, int heads) {
  Place at = {};
  const int64_t block = gridDim.x - 1 - int64_t(blockIdx.x);
  at.head = heads - 1 - int(block % heads);
  const int64_t tile = block / heads;
  const int64_t total = kOfKeys ? a.S : a.T;
  at.span.left = clamp(a.left, -1, 1 << 30);
  at.span.right = clamp(a.right, -1, 1 << 30);
  if (!a.cu_q) {
    const int tiles = int(ceil_div(total, kRows));
    at.batch = int(tile / tiles);
    at.row = int(tile % tiles) * kRows;
    at.span.T = int(a.T);
    at.span.S = int(a.S);
    return at;
  }
  const int32_t* cu = kOfKeys ? a.cu_k : a.cu_q;
  int low = 0, high = int(a.B);  // the last sequence that begins at or before this tile
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (int64_t(cu[middle]) / kRows + middle <= tile) low = middle;
    else high = middle - 1;
  }
  const bool rest = low == a.B;
  // Starts that don't rise, or lie outside, are a bug of the caller: the rows are wrong then, but ours.
  at.q_row0 = clamp(a.cu_q[low], 0, a.T);
  at.k_row0 = clamp(a.cu_k[low], 0, a.S);
  at.span.T = clamp(rest ? a.T : a.cu_q[low + 1], at.q_row0, a.T) - at.q_row0;
  at.span.S = clamp(rest ? a.S : a.cu_k[low + 1], at.k_row0, a.S) - at.k_row0;
  if (rest) (kOfKeys ? at.span.T : at.span.S) = 0;
  at.row = int(tile - (int64_t(cu[low]) / kRows + low)) * kRows;
  return at;
}

// One head of one sequence of a tensor.
template <class T>
__device__ __forceinline__ T* head_of(T* first, const AttentionStride& stride, const Place& at, int row0, int head) {
  return first + at.batch * stride.batch + row0 * stride.row + head * stride.head;
}

// Where the block's sequence has its lse, of a head: (B, H, T), or (H, T) packed.
__device__ __forceinline__ int64_t lse_offset(const Attention& a, const Place& at, int head) {
  return (at.batch * a.H + head) * a.T + at.q_row0;
}

}  // namespace pyllm
