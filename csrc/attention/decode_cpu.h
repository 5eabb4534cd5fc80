// Attention of a few queries to many keys, which is what decoding does: every key and value is read once, where it
// lies, for all the query heads that share it. Nothing is packed; the time goes to reading the cache.
//
// attend() takes the queries of one KV head, `rows` of them (in plain decoding the H / Hkv heads of its group), over a
// run of keys, and carries on from what was found before: online softmax (Milakov and Gimelshein 2018). Runs of one
// cache may be taken apart by several threads and joined by merge() (Flash-Decoding, Dao et al. 2023).
#pragma once
#include "vector_math.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// The keys and values of one KV head of one sequence, as they lie.
template <class T>
struct KeyValues {
  const T *k, *v;                  // key 0; in a paged cache the first key of block 0
  int64_t k_step, v_step;          // from a key to the next
  int64_t k_element, v_element;    // from an element to the next; 1 is what is fast
  const int32_t* table = nullptr;  // paged: table[i] is the block with the keys i * block_size and on
  int64_t block_size = 0, k_block = 0, v_block = 0;

  const T* key(int64_t s) const { return k + at(s, k_step, k_block); }
  const T* value(int64_t s) const { return v + at(s, v_step, v_block); }

 private:
  int64_t at(int64_t s, int64_t step, int64_t block) const {
    return table ? table[s / block_size] * block + s % block_size * step : s * step;
  }
};

// The keys that a query sees.
struct Span {
  int64_t first, end;
};

// A few queries and what they have found so far: m the largest score, l the sum of 2^(score - m), out the sum of
// 2^(score - m) v. Before the first key m is -inf, and l and out are 0 (or m the logit of a sink, and l is 1).
template <class S>
struct FewRows {
  int64_t rows, D, width;  // width: D rounded up to whole vectors, the distance of rows
  const S* q;              // (rows, width), times scale * log2(e), or scale / softcap; zeros beyond D
  const Span* span;        // (rows)
  double softcap;          // 0: none
  S *m, *l, *out;          // (rows), (rows), (rows, width)
};

constexpr int kRun = 64;  // keys at a time: their scores, and the values that follow, stay in the first-level cache

// Scratch that attend() needs, in elements of S.
inline int64_t attend_room(int64_t rows, int64_t width) { return (rows + 2 * width) * kRun; }

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scores of kRows queries and n keys; each dot product is a vector of partial sums until sum_each() ends as many of
// them as a vector has lanes.
template <int kRows, class T, class S>
inline void score(const T* const* key, int n, const S* q, int64_t width, S* scores) {
  using V = VecOf<S>;
  constexpr int kLanes = Compute<S>::kLanes, kKeys = kLanes / kRows;
  for (int j = 0; j < n; j += kKeys) {
    V sum[kLanes] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      V row[kRows];
      for (int r = 0; r < kRows; r++) row[r] = load(q + r * width + d, Full{});
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; i++) {
        const V k = load(key[j + i] + d, Full{});
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) sum[r * kKeys + i] = fma(row[r], k, sum[r * kKeys + i]);
      }
    }
    const V sums = sum_each(sum);
    for (int r = 0; r < kRows; r++)
      memcpy(scores + r * kRun + j, reinterpret_cast<const S*>(&sums) + r * kKeys, kKeys * sizeof(S));
  }
}

// out += p v for kRows queries and kVectors vectors of columns
template <int kRows, int kVectors, class T, class S>
inline void add_values(const T* const* value, int64_t column, int n, const S* p, S* out, int64_t width) {
  using V = VecOf<S>;
  constexpr int kLanes = Compute<S>::kLanes;
  V sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int x = 0; x < kVectors; x++) sum[r][x] = load(out + r * width + column + x * kLanes, Full{});
  for (int j = 0; j < n; j++) {
    V v[kVectors];
#pragma GCC unroll 8
    for (int x = 0; x < kVectors; x++) v[x] = load(value[j] + column + x * kLanes, Full{});
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const V weight = all<V>(p[r * kRun + j]);
#pragma GCC unroll 8
      for (int x = 0; x < kVectors; x++) sum[r][x] = fma(weight, v[x], sum[r][x]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
    for (int x = 0; x < kVectors; x++) store(out + r * width + column + x * kLanes, sum[r][x], Full{});
}
template <int kRows, class T, class S>
inline void add_values(const T* const* value, int n, const S* p, S* out, int64_t width) {
  constexpr int kLanes = Compute<S>::kLanes;
  // Sums enough to keep both multipliers busy, and no more than there are registers.
  constexpr int kMost = kLanes == 16 ? (kRows == 4 ? 4 : 8) : 8 / kRows;
  int64_t d = 0;
  for (; d + kMost * kLanes <= width; d += kMost * kLanes) add_values<kRows, kMost>(value, d, n, p, out, width);
  for (; d < width; d += kLanes) add_values<kRows, 1>(value, d, n, p, out, width);
}

// Scores become 2^(score - m), where the run's keys [at, end) are seen, and 0 elsewhere; m, l and out follow.
template <class S>
inline void soften(S* scores, int64_t at, int64_t end, S softcap, S* m, S* l, S* out, int64_t width) {
  using V = VecOf<S>;
  constexpr int kLanes = Compute<S>::kLanes;
  const S none = -__builtin_inff();
  V top = splat<V>(-__builtin_inff());
  for (int64_t j = 0; j < kRun; j += kLanes) {
    V s = load(scores + j, Full{});
    if (softcap != 0) s = tanh(s) * softcap;
    s = inside(s, j, at, end, none);
    store(scores + j, s, Full{});
    top = max(top, s);
  }
  const S before = *m, highest = hmax(top);
  *m = highest > before ? highest : before;
  const S base = *m == none ? S(0) : *m;  // a query that has seen nothing yet: 2^(-inf - 0) is 0
  V sum = {};
  for (int64_t j = 0; j < kRun; j += kLanes) {
    const V p = exp2(load(scores + j, Full{}) - base);
    store(scores + j, p, Full{});
    sum += p;
  }
  if (*m != before) {
    const S fade = exp2(before - base);
    *l *= fade;
    for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(out + d, Full{}) * fade, Full{});
  }
  *l += hsum(sum);
}

// One run of n <= kRun keys, the first of them number s; key and value point to rows of whole vectors.
template <class T, class S>
inline void attend_run(const FewRows<S>& a, const T* const* key, const T* const* value, int64_t s, int n, S* scores) {
  const S softcap = S(a.softcap) * kLog2E<S>;
  const auto rows_from = [&](int64_t r, auto rows, bool values) {
    constexpr int kRows = decltype(rows)::value;
    if (values) return add_values<kRows>(value, n, scores + r * kRun, a.out + r * a.width, a.width);
    score<kRows>(key, n, a.q + r * a.width, a.width, scores + r * kRun);
  };
  for (int pass = 0; pass < 2; pass++) {
    int64_t r = 0;
    if constexpr (Compute<S>::kLanes >= 4)
      for (; r + 4 <= a.rows; r += 4) rows_from(r, Index<4>{}, pass == 1);
    if constexpr (Compute<S>::kLanes >= 2)
      for (; r + 2 <= a.rows; r += 2) rows_from(r, Index<2>{}, pass == 1);
    for (; r < a.rows; r++) rows_from(r, Index<1>{}, pass == 1);
    for (r = 0; r < a.rows && pass == 0; r++)
      soften(scores + r * kRun, max64(a.span[r].first - s, 0), min64(a.span[r].end - s, n), softcap, a.m + r, a.l + r,
             a.out + r * a.width, a.width);
  }
}

// Copies n elements, `step` apart, and fills up to `width` with zeros.
template <class T, class S>
inline void copy_row(const T* from, int64_t step, int64_t n, S factor, S* to, int64_t width) {
  if (step == 1) {
    for_lanes<T, 1>(n, [&](int64_t i, auto m, auto) { store(to + i, load(from + i, m) * factor, m); });
  } else {
    for (int64_t i = 0; i < n; i++) {
      VecOf<S> v = load(from + i * step, Part{1});
      store(to + i, v * factor, Part{1});
    }
  }
  for (int64_t i = n; i < width; i++) to[i] = 0;
}

// The keys [begin, end) of kv join what `a` has found. room: attend_room() elements.
template <class T, class S>
inline void attend(const FewRows<S>& a, const KeyValues<T>& kv, int64_t begin, int64_t end, S* room) {
  S *scores = room, *k_copy = room + a.rows * kRun, *v_copy = k_copy + a.width * kRun;
  // Rows that are not whole vectors of neighbours are copied first: one kind of loop is enough.
  const bool direct = a.D == a.width && kv.k_element == 1 && kv.v_element == 1;
  for (int64_t s = begin; s < end; s += kRun) {
    const int n = int(min64(kRun, end - s));
    const T *key[kRun], *value[kRun];
    for (int j = 0; j < kRun; j++) {  // beyond n the last one again: it is read, but not seen
      const int64_t at = s + min64(j, n - 1);
      key[j] = kv.key(at);
      value[j] = kv.value(at);
    }
    if (direct) {
      attend_run(a, key, value, s, n, scores);
      continue;
    }
    const S *wide_key[kRun], *wide_value[kRun];
    for (int j = 0; j < kRun; j++) {
      wide_key[j] = k_copy + min64(j, n - 1) * a.width;
      wide_value[j] = v_copy + min64(j, n - 1) * a.width;
    }
    for (int j = 0; j < n; j++) {
      copy_row(key[j], kv.k_element, a.D, S(1), k_copy + j * a.width, a.width);
      copy_row(value[j], kv.v_element, a.D, S(1), v_copy + j * a.width, a.width);
    }
    attend_run(a, wide_key, wide_value, s, n, scores);
  }
}

// One row's results of several runs, (runs) m and l and (runs, width) out at the given distances, joined in the first.
template <class S>
inline void merge(int64_t runs, S* m, S* l, int64_t step, S* out, int64_t out_step, int64_t width) {
  using V = VecOf<S>;
  S highest = m[0];
  for (int64_t i = 1; i < runs; i++) highest = m[i * step] > highest ? m[i * step] : highest;
  const S base = highest == -__builtin_inff() ? S(0) : highest;
  for (int64_t i = 0; i < runs; i++) {
    const S weight = exp2(m[i * step] - base);
    l[0] = i ? l[0] + l[i * step] * weight : l[0] * weight;
    for (int64_t d = 0; d < width; d += Compute<S>::kLanes) {
      const V part = load(out + i * out_step + d, Full{}) * weight;
      store(out + d, i ? load(out + d, Full{}) + part : part, Full{});
    }
  }
  m[0] = highest;
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
