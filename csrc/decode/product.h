// Rows times a matrix, for so few rows that reading the matrix is the work: y[m][n] = sum_k W[n][k] x[m][k].
//
// A weight is read from memory once for all rows of the batch. What a row gets does not depend on how many there are:
// every sum of products runs over k in vectors, in the same order and with the same accumulators, whatever the tile.
#pragma once
#include "../common/simd.h"
#include "decode_cpu.h"
#include "quantized.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr int64_t kPair = 2 * kFloatLanes;

// What a product reads besides the matrix: M rows of K numbers, in the form that the matrix's kind wants.
struct Inputs {
  float* x;      // (M, K): in order, or for bf16 in the order of load_pair; null for packed matrices, which take
  int16_t* q;    // (M, Kp), x in whole steps of `step`, Kp = K rounded up to groups of 32 (zeros beyond K),
  float* step;   // (M, Kp / 32)
  int32_t* sum;  // (M, Kp / 32), the sum of q over each group
  int64_t M, K;
};

inline bool is_packed(int64_t kind) { return kind >= kInt8; }

// Bytes that inputs of M rows and K columns need at most.
inline size_t input_bytes(int64_t M, int64_t K) {
  const int64_t padded = packed_columns(K);
  return size_t(M) * size_t(padded * 4 + padded * 2 + padded / kGroup * 8) + 256;
}
inline Inputs inputs_at(char* at, int64_t kind, int64_t M, int64_t K) {
  Inputs in{nullptr, nullptr, nullptr, nullptr, M, K};
  const int64_t padded = packed_columns(K);
  if (!is_packed(kind)) {
    in.x = reinterpret_cast<float*>(at);
  } else {
    in.step = reinterpret_cast<float*>(at);
    in.sum = reinterpret_cast<int32_t*>(in.step + M * (padded / kGroup));
    in.q = reinterpret_cast<int16_t*>(in.sum + M * (padded / kGroup));
  }
  return in;
}

// Row m of the inputs from x (K).
inline void put_row(const Inputs& in, int64_t kind, int64_t m, const float* x) {
  if (is_packed(kind)) {
    const int64_t padded = packed_columns(in.K), groups = padded / kGroup;
    quantize_row(x, in.K, in.q + m * padded, in.step + m * groups, in.sum + m * groups);
    return;
  }
  float* to = in.x + m * in.K;
  int64_t i = 0;
  if (kind == kBFloat16 && kEvenOdd<bf16>)
    for (; i + kPair <= in.K; i += kPair)
      for (int j = 0; j < kFloatLanes; j++) {
        to[i + j] = x[i + 2 * j];
        to[i + kFloatLanes + j] = x[i + 2 * j + 1];
      }
  memcpy(to + i, x + i, size_t(in.K - i) * sizeof(float));
}

// out[b][r] = sum_k w[r][k] x[b][k] for R outputs and B rows at once, in registers. Meanwhile asks for what lies
// `ahead` elements on, in the order of memory: the R rows are read side by side, and that many short streams at once
// are more than the CPU's own prefetcher follows.
template <class T, int R, int B>
inline void dots(const T* w, int64_t K, const float* x, float* out, int64_t out_stride, int64_t ahead) {
  Vec even[R][B] = {}, odd[R][B] = {};
  const char* next = reinterpret_cast<const char*>(w + ahead);
  int64_t i = 0;
  for (; i + kPair <= K; i += kPair) {
    constexpr int kBytes = R * int(sizeof(T)) * int(kPair);
    if (ahead)
      for (int j = 0; j < kBytes; j += 64) __builtin_prefetch(next + j, 0, 2);  // into the second-level cache
    next += kBytes;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Pair p = load_pair(w + r * K + i);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) {
        even[r][b] = fma(p.even, load(x + b * K + i, Full{}), even[r][b]);
        odd[r][b] = fma(p.odd, load(x + b * K + i + kFloatLanes, Full{}), odd[r][b]);
      }
    }
  }
  for (; i < K; i += kFloatLanes) {
    const Part part{int(min64(K - i, kFloatLanes))};
    for (int r = 0; r < R; r++) {
      const Vec v = part.n == kFloatLanes ? load(w + r * K + i, Full{}) : load(w + r * K + i, part);
      for (int b = 0; b < B; b++)
        even[r][b] = fma(v, part.n == kFloatLanes ? load(x + b * K + i, Full{}) : load(x + b * K + i, part), even[r][b]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; b++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) out[b * out_stride + r] = hsum(even[r][b] + odd[r][b]);
}

// Rows that share a weight in registers: as many accumulators as the CPU has room for.
constexpr int kRowsAtOnce = kFloatLanes == 16 ? 4 : 3;
constexpr int kOutputs = 4;

// For a single row the matrix is read straight through, one output after another: nothing is faster than one long
// stream, and nobody needs to ask ahead for it. More rows would then load x more often than there is time for.
template <class T, int B>
inline void dots_of(const T* w, int outputs, int64_t K, const float* x, float* out, int64_t out_stride, int64_t ahead) {
  constexpr int R = B == 1 ? 1 : kOutputs;
  int r = 0;
  for (; r + R <= outputs; r += R) dots<T, R, B>(w + r * K, K, x, out + r, out_stride, ahead);
  for (; r < outputs; r++) dots<T, 1, B>(w + r * K, K, x, out + r, out_stride, 0);
}

template <class T>
void product_of(const Matrix& matrix, int64_t begin, int64_t end, const Inputs& in, float* out, int64_t out_stride) {
  const T* weight = static_cast<const T*>(matrix.weight);
  const int64_t K = in.K, tiles = (in.M + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t n = begin; n < end; n += kOutputs) {
    const T* w = weight + n * K;
    const int outputs = int(min64(kOutputs, end - n));
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = in.M * t / tiles, rows = in.M * (t + 1) / tiles - first;
      const float* x = in.x + first * K;
      float* to = out + first * out_stride + (n - begin);
      const int64_t ahead = t == 0 ? kOutputs * K : 0;  // the next outputs; later tiles find theirs in the cache
      if (rows == 1) dots_of<T, 1>(w, outputs, K, x, to, out_stride, 0);
      if (rows == 2) dots_of<T, 2>(w, outputs, K, x, to, out_stride, ahead);
      if (rows == 3) dots_of<T, 3>(w, outputs, K, x, to, out_stride, ahead);
      if constexpr (kRowsAtOnce == 4)
        if (rows == 4) dots_of<T, 4>(w, outputs, K, x, to, out_stride, ahead);
    }
  }
}

// out[m][n - begin] = sum_k W[n][k] x[m][k] for n in [begin, end); begin is a multiple of kBlock.
inline void product(const Matrix& w, int64_t begin, int64_t end, const Inputs& in, float* out, int64_t out_stride) {
  switch (w.kind) {
    case kFloat32: return product_of<float>(w, begin, end, in, out, out_stride);
    case kBFloat16: return product_of<bf16>(w, begin, end, in, out, out_stride);
    case kFloat16: return product_of<f16>(w, begin, end, in, out, out_stride);
    default: return packed_product(w, begin, end, in.K, in.M, in.q, in.step, in.sum, out, out_stride);
  }
}

template <class T>
inline void add_bias(const void* bias, int64_t begin, int64_t end, int64_t M, float* out, int64_t out_stride) {
  if (!bias) return;
  for (int64_t m = 0; m < M; m++)
    for_lanes<float, 1>(end - begin, [&](int64_t i, auto part, auto) {
      float* to = out + m * out_stride + i;
      store(to, load(to, part) + load(static_cast<const T*>(bias) + begin + i, part), part);
    });
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
