// Attention of a few queries to many keys on the CPU (decoding): decode_cpu.h over all sequences and KV heads.
//
// Bytes moved, which is what the time goes to: the seen keys and values, once.
#include "sequences.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// Keys of one task. Few sequences and heads would leave threads without work, so their keys are taken apart; always at
// the same places, so that the result is the same, bit for bit, for any number of threads.
constexpr int64_t kSplit = 512;

template <class T>
void few(const AttentionFwd& a) {
  using S = ScalarOf<T>;
  const AttentionShape& shape = a.shape;
  const int64_t D = shape.D, width = round_up(D, Compute<S>::kLanes), heads = shape.B * shape.Hkv;
  fill_unowned<T>(a);

  int64_t rows = 0, splits = 1, work = 0;  // the most rows of a sequence and splits of its keys
  for (int64_t i = 0; i < shape.B; i++) {
    const Sequence s = sequence_of(shape, i);
    if (s.rows() == 0) continue;
    const Span seen = span_of(shape, s, 0, s.rows());
    rows = max64(rows, s.rows());
    splits = max64(splits, (seen.end - seen.first / kSplit * kSplit + kSplit - 1) / kSplit);
    work += (seen.end - seen.first) * s.rows() * D * shape.Hkv;
  }
  if (rows == 0) return;

  // Results of (head, split), then for every thread its queries, their spans and attend()'s room.
  const int64_t part = rows * (width + 2), parts = heads * splits;
  const int64_t own = round_up(rows * width + rows * int64_t(sizeof(Span) / sizeof(S)) + attend_room(rows, width), 16);
  const int threads = threads_for(parts, work / 8);
  S* const results = static_cast<S*>(scratch(size_t(round_up(parts * part, 16) + threads * own) * sizeof(S)));
  S* const rooms = results + round_up(parts * part, 16);

#pragma omp parallel num_threads(threads)
  {
    S* const q = rooms + omp_get_thread_num() * own;
    Span* const span = reinterpret_cast<Span*>(q + rows * width);
    S* const room = reinterpret_cast<S*>(span + rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < parts; task++) {
      const int64_t i = task / splits / shape.Hkv, head = task / splits % shape.Hkv;
      const Sequence s = sequence_of(shape, i);
      S* const m = results + task * part;
      FewRows<S> state{s.rows(), D, width, q, span, shape.softcap, m, m + rows, m + 2 * rows};
      if (state.rows == 0) continue;
      for (int64_t r = 0; r < state.rows; r++) {
        const bool sink = a.sinks && task % splits == 0;
        m[r] = sink ? static_cast<const S*>(a.sinks)[head * s.group + r % s.group] * kLog2E<S> : -__builtin_inff();
        state.l[r] = sink && m[r] > -__builtin_inff() ? 1 : 0;
        span[r] = span_of(shape, s, r);
      }
      memset(state.out, 0, size_t(state.rows * width) * sizeof(S));
      const Span seen = span_of(shape, s, 0, state.rows);
      const int64_t begin = (seen.first / kSplit + task % splits) * kSplit;
      const int64_t first = max64(begin, seen.first), end = min64(begin + kSplit, seen.end);
      if (first >= end) continue;
      for (int64_t r = 0; r < state.rows; r++)
        copy_row(row_of(static_cast<const T*>(a.q), shape.q_stride, s, head, r), shape.q_stride.d, D,
                 unit_of<S>(shape), q + r * width, width);
      attend(state, keys_of<T>(shape, a.k, a.v, s, i, head), first, end, room);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < heads; pair++) {
      const int64_t i = pair / shape.Hkv, head = pair % shape.Hkv;
      const Sequence s = sequence_of(shape, i);
      for (int64_t r = 0; r < s.rows(); r++) {
        S *m = results + pair * splits * part + r, *l = m + rows, *out = m - r + 2 * rows + r * width;
        if (splits > 1) merge(splits, m, l, part, out, part, width);
        const S factor = normaliser(*l);
        T* to = row_of(static_cast<T*>(a.out), contiguous(shape.T, shape.H, D), s, head, r);
        for_lanes<T, 1>(D, [&](int64_t d, auto lanes, auto) { store(to + d, load(out + d, lanes) * factor, lanes); });
        if (a.lse) static_cast<S*>(a.lse)[lse_of(shape, s, head, r)] = lse_from(*m, *l);
      }
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
