// Attention of the newest tokens to the cache: one row, one key-value head, one chunk of columns at a time.
//
// A piece of work rotates its queries, writes those new keys and values that fall into its chunk, and leaves for every
// query a part of the softmax: the largest score, the sum of exponentials, the weighted sum of values. `merge` puts the
// parts of a query together. Chunks begin at fixed columns, so that the result does not depend on the threads, nor on
// what else is in the batch.
#pragma once
#include "../common/simd.h"
#include "decode_cpu.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr int64_t kColumns = 256;  // of a chunk: its keys and values stay in the second-level cache

inline float sum_of_squares(const float* x, int64_t n) {
  Vec sum[4] = {};
  for_lanes<float, 4>(n, [&](int64_t i, auto m, auto index) {
    const Vec v = load(x + i, m);
    sum[index] = fma(v, v, sum[index]);
  });
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// to = x / sqrt(mean(x^2) + eps) * weight
template <class T>
inline void rms_norm_row(const float* x, const T* weight, int64_t n, float eps, float* to) {
  const float rstd = 1.f / sqrt(sum_of_squares(x, n) / float(n) + eps);
  for_lanes<float, 1>(n, [&](int64_t i, auto m, auto) { store(to + i, load(x + i, m) * rstd * load(weight + i, m), m); });
}

// to = the head x (D), normed where there is a weight, rotated and multiplied by scale
template <class T>
inline void rotated(const float* x, const T* norm, const float* cos, const float* sin, int64_t D, float eps, float scale,
                    float* to) {
  const int64_t half = D / 2;
  if (norm)
    rms_norm_row(x, norm, D, eps, to);
  else
    memcpy(to, x, size_t(D) * sizeof(float));
  for_lanes<float, 1>(half, [&](int64_t i, auto m, auto) {
    const Vec a = load(to + i, m), b = load(to + half + i, m), c = load(cos + i, m), s = load(sin + i, m);
    store(to + i, (a * c - b * s) * scale, m);
    store(to + half + i, (b * c + a * s) * scale, m);
  });
}

// scores[c] = q . keys[c] for `count` keys `stride` apart
template <class T>
inline void scores_of(const float* q, const T* keys, int64_t stride, int64_t count, int64_t D, float* scores) {
  constexpr int kKeys = 4;
  for (int64_t c = 0; c < count; c += kKeys) {
    const T* key[kKeys];  // past the end: the last one again
    for (int j = 0; j < kKeys; j++) key[j] = keys + min64(c + j, count - 1) * stride;
    Vec sum[kKeys] = {};
    for_lanes<float, 1>(D, [&](int64_t i, auto m, auto) {
      const Vec v = load(q + i, m);
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; j++) sum[j] = fma(v, load(key[j] + i, m), sum[j]);
    });
    for (int j = 0; j < kKeys && c + j < count; j++) scores[c + j] = hsum(sum[j]);
  }
}

// kVecs vectors, or a part of one, of to = sum_c weights[c] values[c]: even and odd c apart, as they come
template <class T, int kVecs, class M>
inline void weighted_part(const float* weights, const T* values, int64_t stride, int64_t count, float* to, M m) {
  Vec even[kVecs] = {}, odd[kVecs] = {};
  int64_t c = 0;
  for (; c + 2 <= count; c += 2) {
    const T *v = values + c * stride, *next = v + stride;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; j++) {
      even[j] = fma(weights[c], load(v + j * kFloatLanes, m), even[j]);
      odd[j] = fma(weights[c + 1], load(next + j * kFloatLanes, m), odd[j]);
    }
  }
  for (int j = 0; j < kVecs; j++) {
    if (c < count) even[j] = fma(weights[c], load(values + c * stride + j * kFloatLanes, m), even[j]);
    store(to + j * kFloatLanes, even[j] + odd[j], m);
  }
}
template <class T>
inline void weighted_sum(const float* weights, const T* values, int64_t stride, int64_t count, int64_t D, float* to) {
  int64_t i = 0;
  for (; i + 4 * kFloatLanes <= D; i += 4 * kFloatLanes)
    weighted_part<T, 4>(weights, values + i, stride, count, to + i, Full{});
  for (; i + kFloatLanes <= D; i += kFloatLanes)
    weighted_part<T, 1>(weights, values + i, stride, count, to + i, Full{});
  if (i < D) weighted_part<T, 1>(weights, values + i, stride, count, to + i, Part{int(D - i)});
}

// scores become exponentials; their largest and sum
inline void softmax_part(float* scores, int64_t count, float* largest, float* sum) {
  float top = -__builtin_inff();
  for (int64_t c = 0; c < count; c++) top = scores[c] > top ? scores[c] : top;
  *largest = top;
  *sum = 0.f;
  if (top == -__builtin_inff()) {  // nothing to see, or only NaN, which must stay
    for (int64_t c = 0; c < count; c++) {
      scores[c] = scores[c] == scores[c] ? 0.f : scores[c];
      *sum += scores[c];
    }
    return;
  }
  Vec total = {};
  for_lanes<float, 1>(count, [&](int64_t i, auto m, auto) {
    const Vec e = exp(load(scores + i, m) - top);
    store(scores + i, e, m);
    // lanes past a part are exp(0 - top): not part of the sum
    total += load(scores + i, m);
  });
  *sum = hsum(total);
}

// Where the parts of a query lie: parts[row][head][chunk], each (D + 2): values, largest, sum.
struct Parts {
  float* data;
  int64_t chunks, T, H, D;
  float* at(int64_t row, int64_t t, int64_t head, int64_t chunk) const {
    return data + (((row * T + t) * H + head) * chunks + chunk) * (D + 2);
  }
};

// One piece of work. qkv (M, (H + 2 Hkv) D); queries (T G, D) and scores (columns) are the thread's own.
template <class T>
void attend(const DecodeStep& s, int64_t layer, int64_t row, int64_t head, int64_t chunk, const float* qkv,
            const Parts& parts, float* queries, float* scores) {
  const DecodeLayer& l = s.layers[layer];
  const DecodeCache& cache = s.caches[layer];
  const int64_t D = s.D, G = s.H / s.Hkv, width = (s.H + 2 * s.Hkv) * D, stride = s.Hkv * D;
  const int64_t begin = chunk * kColumns, end = min64(begin + kColumns, s.ends[row]);
  if (begin >= end) return;
  T* keys = static_cast<T*>(cache.keys) + row * cache.row_stride + head * D;
  T* values = static_cast<T*>(cache.values) + row * cache.row_stride + head * D;

  for (int64_t t = 0; t < s.T; t++) {
    const float* mine = qkv + (row * s.T + t) * width;
    const float* cos = s.cos + row * s.angle_stride + t * (D / 2);
    const float* sin = s.sin + row * s.angle_stride + t * (D / 2);
    const int64_t column = s.first[row] + t;
    if (begin <= column && column < end) {
      const float* v = mine + (s.H + s.Hkv + head) * D;
      rotated(mine + (s.H + head) * D, static_cast<const T*>(l.k_norm), cos, sin, D, s.eps, 1.f, queries);
      for_lanes<float, 1>(D, [&](int64_t i, auto m, auto) {
        store(keys + column * stride + i, load(queries + i, m), m);
        store(values + column * stride + i, load(v + i, m), m);
      });
    }
  }
  const float scale = 1.f / sqrt(float(D));
  for (int64_t t = 0; t < s.T; t++) {
    const float* mine = qkv + (row * s.T + t) * width;
    const float* cos = s.cos + row * s.angle_stride + t * (D / 2);
    const float* sin = s.sin + row * s.angle_stride + t * (D / 2);
    // the columns of this chunk that the query sees
    int64_t low = begin, high = end;
    if (!s.ring && !cache.mask) {
      high = min64(high, s.first[row] + t + 1);
      if (l.window) low = max64(low, s.first[row] + t + 1 - l.window);
    }
    const int64_t count = max64(high - low, 0);
    for (int64_t g = 0; g < G; g++) {
      float* part = parts.at(row, t, head * G + g, chunk);
      if (count == 0) {
        memset(part, 0, size_t(D + 2) * sizeof(float));
        part[D] = -__builtin_inff();
        continue;
      }
      rotated(mine + (head * G + g) * D, static_cast<const T*>(l.q_norm), cos, sin, D, s.eps, scale, queries);
      scores_of(queries, keys + low * stride, stride, count, D, scores);
      if (cache.mask) {
        const uint8_t* seen = cache.mask + row * cache.mask_row + t * cache.mask_query + low;
        for (int64_t c = 0; c < count; c++) scores[c] = seen[c] ? scores[c] : -__builtin_inff();
      }
      softmax_part(scores, count, part + D, part + D + 1);
      weighted_sum(scores, values + low * stride, stride, count, D, part);
    }
  }
}

// The attention of one query from its parts, to (D).
inline void merge(const Parts& parts, int64_t row, int64_t t, int64_t head, int64_t columns, float* to) {
  const int64_t chunks = (columns + kColumns - 1) / kColumns, D = parts.D;
  float top = -__builtin_inff(), sum = 0.f;
  for (int64_t c = 0; c < chunks; c++) {
    const float largest = parts.at(row, t, head, c)[D];
    top = largest > top ? largest : top;
  }
  memset(to, 0, size_t(D) * sizeof(float));
  for (int64_t c = 0; c < chunks; c++) {
    const float* part = parts.at(row, t, head, c);
    if (part[D] == -__builtin_inff() && top != part[D]) continue;
    const float weight = top == part[D] ? 1.f : exp(splat<Vec>(part[D] - top))[0];
    sum += weight * part[D + 1];
    for_lanes<float, 1>(D, [&](int64_t i, auto m, auto) { store(to + i, fma(weight, load(part + i, m), load(to + i, m)), m); });
  }
  if (sum == 0.f) return;  // a row that sees nothing: zeros
  for_lanes<float, 1>(D, [&](int64_t i, auto m, auto) { store(to + i, load(to + i, m) / sum, m); });
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
