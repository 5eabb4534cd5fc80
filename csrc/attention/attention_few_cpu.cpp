// Attention of a few queries to many keys on the CPU (decoding): decode_cpu.h over all sequences and KV heads.
//
// Bytes moved, which is what the time goes to: the seen keys and values, once.
#include "sequences.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// Keys of one task, all heads of them: as they usually lie, (B, S, Hkv, D), a task then reads one piece of memory from
// end to end. Cut by the shape alone, so that the result is the same, bit for bit, for any number of threads; a task has
// a quarter of a megabyte of float32 to read, or as much to compute.
inline int64_t keys_of_task(const AttentionShape& a, int64_t rows) {
  return round_up((int64_t(1) << 15) / max64(max64(a.Hkv, a.Hkv * rows / 8) * a.D, 1), kRun) + kRun;
}

template <class T>
void few(const AttentionFwd& a) {
  using S = ScalarOf<T>;
  const AttentionShape& shape = a.shape;
  const int64_t D = shape.D, Hkv = shape.Hkv, width = round_up(D, Compute<S>::kLanes);
  fill_unowned<T>(a);

  int64_t rows = 0, longest = 0, work = 0;  // the most rows of a KV head and keys that a sequence has
  for (int64_t i = 0; i < shape.B; i++) {
    const Sequence s = sequence_of(shape, i);
    if (s.rows() == 0) continue;
    const Span seen = span_of(shape, s, 0, s.rows());
    rows = max64(rows, s.rows());
    longest = max64(longest, seen.end - seen.first);
    work += (seen.end - seen.first) * s.rows() * D * Hkv;
  }
  if (rows == 0) return;
  const int64_t keys = keys_of_task(shape, rows), splits = max64((longest + keys - 1) / keys, 1);

  // For every task what its rows found: m, l and out of all heads. For every thread its queries, spans, attend()'s room.
  const int64_t all = Hkv * rows, part = all * (width + 2), tasks = shape.B * splits;
  const int64_t own = round_up(all * width + rows * int64_t(sizeof(Span) / sizeof(S)) + attend_room(rows, width), 16);
  const int threads = threads_for(tasks, work / 8);
  S* const results = static_cast<S*>(scratch(size_t(round_up(tasks * part, 16) + threads * own) * sizeof(S)));
  S* const rooms = results + round_up(tasks * part, 16);

#pragma omp parallel num_threads(threads)
  {
    S* const q = rooms + omp_get_thread_num() * own;
    Span* const span = reinterpret_cast<Span*>(q + all * width);
    S* const room = reinterpret_cast<S*>(span + rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t i = task / splits, split = task % splits;
      const Sequence s = sequence_of(shape, i);
      const int64_t n = s.rows();
      if (n == 0) continue;
      S *const m = results + task * part, *const l = m + all, *const out = l + all;
      const Span seen = span_of(shape, s, 0, n);
      const int64_t begin = seen.first + split * keys, end = min64(begin + keys, seen.end);
      for (int64_t r = 0; r < n; r++) span[r] = span_of(shape, s, r);
      for (int64_t head = 0; head < Hkv; head++)
        for (int64_t r = 0; r < n; r++) {
          const int64_t at = head * rows + r;
          const bool sink = a.sinks && split == 0;
          m[at] = sink ? static_cast<const S*>(a.sinks)[head * s.group + r % s.group] * kLog2E<S> : -__builtin_inff();
          l[at] = m[at] > -__builtin_inff() ? 1 : 0;
          memset(out + at * width, 0, size_t(width) * sizeof(S));
          copy_row(row_of(static_cast<const T*>(a.q), shape.q_stride, s, head, r), shape.q_stride.d, D,
                   unit_of<S>(shape), q + at * width, width);
        }
      for (int64_t key = begin; key < end; key += kRun)
        for (int64_t head = 0; head < Hkv; head++) {
          const int64_t at = head * rows;
          const FewRows<S> state{n, D, width, q + at * width, span, shape.softcap, m + at, l + at, out + at * width};
          attend(state, keys_of<T>(shape, a.k, a.v, s, i, head), key, min64(key + kRun, end), room);
        }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < shape.B * all; row++) {
      const int64_t i = row / all, at = row % all, head = at / rows, r = at % rows;
      const Sequence s = sequence_of(shape, i);
      if (r >= s.rows()) continue;
      S *m = results + i * splits * part + at, *l = m + all, *out = m - at + 2 * all + at * width;
      if (splits > 1) merge(splits, m, l, part, out, part, width);
      const S factor = normaliser(*l);
      T* to = row_of(static_cast<T*>(a.out), contiguous(shape.T, shape.H, D), s, head, r);
      for_lanes<T, 1>(D, [&](int64_t d, auto lanes, auto) { store(to + d, load(out + d, lanes) * factor, lanes); });
      if (a.lse) static_cast<S*>(a.lse)[lse_of(shape, s, head, r)] = lse_from(*m, *l);
    }
  }
}

}  // namespace

void attention_few(const AttentionFwd& a) {
  switch (a.shape.dtype) {
    case kFloat32: return few<float>(a);
    case kBFloat16: return few<bf16>(a);
    case kFloat16: return few<f16>(a);
    case kFloat64: return few<double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
