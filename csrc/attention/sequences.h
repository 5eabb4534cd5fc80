// Where the sequences of an attention call lie, and which keys their queries see.
#pragma once
#include "attention_cpu.h"
#include "decode_cpu.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// A sequence's T queries and S keys. The heads that share a KV head make the rows of one matrix, token by token: row
// t * group + g is query t of head g of the group. It wastes least at the causal diagonal, and few queries of many
// heads are as good as many queries.
struct Sequence {
  int64_t b, q_row, k_row;  // batch entry and first rows of q (out, lse) and k
  int64_t T, S, group;

  int64_t rows() const { return T * group; }
};

inline Sequence sequence_of(const AttentionShape& a, int64_t i) {
  const int64_t group = a.Hkv ? a.H / a.Hkv : 0;
  if (a.cu_q) return {0, a.cu_q[i], a.cu_k[i], a.cu_q[i + 1] - a.cu_q[i], a.cu_k[i + 1] - a.cu_k[i], group};
  return {i, 0, 0, a.T, a.lengths ? a.lengths[i] : a.S, group};
}

inline Span span_of(const AttentionShape& a, const Sequence& s, int64_t row) {
  const int64_t at = row / s.group + s.S - s.T;
  const int64_t first = a.left < 0 ? 0 : max64(at - a.left, 0);
  const int64_t end = a.right < 0 ? s.S : min64(at + a.right + 1, s.S);
  return {min64(first, s.S), max64(end, min64(first, s.S))};
}
// All keys that the rows [row, row + n) see.
inline Span span_of(const AttentionShape& a, const Sequence& s, int64_t row, int64_t n) {
  return {span_of(a, s, row).first, span_of(a, s, row + n - 1).end};
}

// Element 0 of a row of q, or of anything like it; `head` is the KV head.
template <class T>
inline T* row_of(T* q, const Strides& stride, const Sequence& s, int64_t head, int64_t row) {
  return q + s.b * stride.b + (s.q_row + row / s.group) * stride.t + (head * s.group + row % s.group) * stride.h;
}
// Asks for a row that will be read (or written) a little later: rows of a head are far apart, beyond what the CPU
// foresees by itself, and a block's arithmetic hides the wait.
template <bool kWrite, class T>
inline void prefetch_row(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, kWrite);
}
// The same place of a contiguous tensor.
inline Strides contiguous(int64_t T, int64_t H, int64_t D) { return {T * H * D, H * D, D, 1}; }
// Index of a row in lse.
inline int64_t lse_of(const AttentionShape& a, const Sequence& s, int64_t head, int64_t row) {
  return (s.b * a.H + head * s.group + row % s.group) * a.T + s.q_row + row / s.group;
}

template <class T>
inline KeyValues<T> keys_of(const AttentionShape& a, const void* k, const void* v, const Sequence& s, int64_t i,
                            int64_t head) {
  const Strides &ks = a.k_stride, &vs = a.v_stride;
  const int64_t b = a.table ? 0 : s.b;
  KeyValues<T> kv{static_cast<const T*>(k) + b * ks.b + s.k_row * ks.t + head * ks.h,
                  static_cast<const T*>(v) + b * vs.b + s.k_row * vs.t + head * vs.h, ks.t, vs.t, ks.d, vs.d};
  if (a.table) {
    kv.table = a.table + i * a.table_stride;
    kv.block_size = a.block_size;
    kv.k_block = ks.b;
    kv.v_block = vs.b;
  }
  return kv;
}

// What the scores' units are: q is multiplied by this, so that they come out times log2(e), or over the softcap.
template <class S>
inline S unit_of(const AttentionShape& a) {
  return S(a.softcap != 0 ? a.scale / a.softcap : a.scale * kLog2E<double>);
}

// A finished row: out over l, rounded, and lse. Nothing seen: zeros and -inf.
template <class S>
inline S normaliser(S l) { return l == 0 ? S(0) : 1 / l; }
template <class S>
inline S lse_from(S m, S l) { return l == 0 ? S(-__builtin_inff()) : (m + log2(l)) * kLn2<S>; }

// Packed rows that belong to no sequence see nothing: zeros, and lse -inf or the sink.
template <class T>
inline void fill_unowned(const AttentionFwd& a) {
  const AttentionShape& shape = a.shape;
  if (!shape.cu_q) return;
  const int64_t first = shape.cu_q[shape.B], n = (shape.T - first) * shape.H * shape.D;
  if (n > 0) memset(static_cast<T*>(a.out) + first * shape.H * shape.D, 0, size_t(n) * sizeof(T));
  using S = ScalarOf<T>;
  for (int64_t h = 0; h < shape.H && a.lse; h++)
    for (int64_t t = first; t < shape.T; t++)
      static_cast<S*>(a.lse)[h * shape.T + t] = a.sinks ? static_cast<const S*>(a.sinks)[h] : S(-__builtin_inff());
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
