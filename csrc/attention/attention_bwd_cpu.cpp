// Attention's backward on the CPU (Dao 2023): the probabilities come again of q, k and lse, tile by tile.
//
//   P = exp(s - lse),  dP = do v^T,  dS = P * (dP - delta),  delta = sum(do * out) - dlse
//   dv = P^T do,  dk = scale dS^T q,  dq = scale dS k                    (softcap: dS * (1 - tanh^2))
//
// A task is a range of rows of one KV head: dq of its rows is its own, dk and dv are sums over rows. Where a head makes
// several tasks each has sums of its own, and they are added at the end. How many there are depends on nothing but the
// shape: the result is the same, bit for bit, for any number of threads, and nobody waits for anybody.
//
// FLOPs: 10 D for a pair of query and key.
#include "blocks.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRows = 96, kKeys = 128;
#else
constexpr int64_t kRows = 96, kKeys = 64;
#endif
constexpr int64_t kStrips = (kRows + kTileRows - 1) / kTileRows;

// A task's rows go through the keys in stretches of so many blocks, all of which meet the same few keys before the next
// keys come: these, in three forms, and the sums of dk and dv stay in the second-level cache meanwhile.
constexpr int64_t kBlocks = 8;
inline int64_t keys_together(int64_t D) { return max64(16384 / D / kKeys, 1) * kKeys; }

// Heads are taken apart until there are kTasks tasks, or tasks of less than a stretch would come out, of which the sums
// of dk and dv would take a good part of the time.
constexpr int64_t kTasks = 32, kTaskRows = kBlocks * kRows;
constexpr int64_t kSlices = 8;  // of a head's keys, when the sums are added

// Memory of a thread: a stretch's blocks one behind the other.
template <class S>
struct Room {
  S *q, *dout, *dq, *lse, *delta, *scores, *dscores, *pack;
  Span* span;
  int64_t matrix;  // size of a block of q

  static int64_t size(int64_t D) {
    return 3 * kBlocks * panels_size<S>(kRows, D) + 2 * kBlocks * kRows + 2 * kRows * kKeys +
           kPanel<S> * round_up(D, Compute<S>::kLanes) + kBlocks * kRows * int64_t(sizeof(Span) / sizeof(S));
  }
  Room(S* at, int64_t D) : matrix(panels_size<S>(kRows, D)) {
    q = at;
    dout = q + kBlocks * matrix;
    dq = dout + kBlocks * matrix;
    lse = dq + kBlocks * matrix;
    delta = lse + kBlocks * kRows;
    scores = delta + kBlocks * kRows;
    dscores = scores + kRows * kKeys;
    span = reinterpret_cast<Span*>(dscores + kRows * kKeys);
    pack = reinterpret_cast<S*>(span + kBlocks * kRows);
  }
  // The same, beginning with another block.
  Room from(int64_t block) const {
    Room room = *this;
    room.q += block * matrix, room.dout += block * matrix, room.dq += block * matrix;
    room.lse += block * kRows, room.delta += block * kRows, room.span += block * kRows;
    return room;
  }
};

// Scores of one row over its strip's panels become P, dscores (which are dP) dS; both 0 where the row doesn't see.
template <class S>
void differentiate_row(S* scores, S* dscores, int64_t panel, const Strip& strip, Span seen, S lse, S delta, S softcap) {
  using V = VecOf<S>;
  constexpr int kLanes = Compute<S>::kLanes;
  constexpr int64_t kStep = kPanel<S>;
  for (int64_t p = strip.first_panel; p < strip.end_panel; p++) {
    const int64_t key = p * kStep;
    const bool whole = seen.first <= key && key + kStep <= seen.end;
    for (int x = 0; x < 2; x++) {
      S *at = scores + p * panel + x * kLanes, *d_at = dscores + p * panel + x * kLanes;
      V s = load(at, Full{}), slope = splat<V>(1.f);
      if (softcap != 0) {
        s = tanh(s);
        slope = 1.f - s * s;
        s = s * softcap;
      }
      V e = exp2(s - lse), d = e * (load(d_at, Full{}) - delta);
      if (softcap != 0) d = d * slope;
      if (!whole) {
        e = inside(e, key + x * kLanes, seen.first, seen.end, 0);
        d = inside(d, key + x * kLanes, seen.first, seen.end, 0);
      }
      store(at, e, Full{});
      store(d_at, d, Full{});
    }
  }
}

// Brings the rows [row, row + rows) of q and dout into a block's panels, and takes their delta.
template <class T, class S>
void prepare_block(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t row, int64_t rows,
                   const Room<S>& room) {
  const AttentionShape& shape = a.shape;
  constexpr int64_t kStep = kPanel<S>, kAhead = 8;
  const int64_t D = shape.D, panel = kRows * kStep;
  const auto of = [&](const void* x, const Strides& stride, int64_t r) {
    return row_of(static_cast<const T*>(x), stride, s, head, row + r);
  };
  for (int64_t r = 0; r < rows; r++) {
    if (r + kAhead < rows) {
      prefetch_row<false>(of(a.q, shape.q_stride, r + kAhead), D);
      prefetch_row<false>(of(a.out, a.out_stride, r + kAhead), D);
      prefetch_row<false>(of(a.dout, a.dout_stride, r + kAhead), D);
    }
    room.span[r] = span_of(shape, s, row + r);
    pack_row(of(a.q, shape.q_stride, r), shape.q_stride.d, D, unit_of<S>(shape), room.q, panel, r);
    pack_row(of(a.dout, a.dout_stride, r), a.dout_stride.d, D, S(1), room.dout, panel, r);
    const int64_t at = lse_of(shape, s, head, row + r);
    const S lse = static_cast<const S*>(a.lse)[at];
    room.lse[r] = lse == -__builtin_inff() ? S(0) : lse * kLog2E<S>;  // where nothing is seen all is masked anyway
    S* out = room.pack;
    copy_row(of(a.out, a.out_stride, r), a.out_stride.d, D, S(1), out, round_up(D, kStep));
    VecOf<S> sum[2] = {};
    for (int64_t d = 0; d < D; d += kStep)
      for (int x = 0; x < 2; x++) {
        const S* dout = room.dout + d / kStep * panel + r * kStep + x * Compute<S>::kLanes;
        sum[x] = fma(load(dout, Full{}), load(out + d + x * Compute<S>::kLanes, Full{}), sum[x]);
      }
    room.delta[r] = hsum(sum[0] + sum[1]) - (a.dlse ? static_cast<const S*>(a.dlse)[at] : S(0));
    if (a.delta) static_cast<S*>(a.delta)[at] = room.delta[r];
  }
  memset(room.dq, 0, size_t(room.matrix) * sizeof(S));
}

// The block's rows against the keys [first, end) as far as they see them; its dq, and dk and dv (rows of panels) grow.
template <class S>
void differentiate_block(const AttentionShape& shape, int64_t rows, int64_t first, int64_t end,
                         const PackedKeys<S>& keys, const Room<S>& room, S* dk, S* dv) {
  constexpr int64_t kStep = kPanel<S>;
  const int64_t D = shape.D, panel = kRows * kStep, key_panel = keys.rows * kStep;
  const S softcap = S(shape.softcap) * kLog2E<S>;
  end = min64(end, room.span[rows - 1].end);
  for (int64_t key = max64(first, room.span[0].first / kStep * kStep); key < end; key += kKeys) {
    const int64_t n = min64(kKeys, end - key);
    Strip strips[kStrips];
    cut_strips<S>(room.span, rows, key, n, strips);
    multiply_seen(strips, rows, panel, room.q, keys.k_columns + key * D, room.scores, n, D);
    multiply_seen(strips, rows, panel, room.dout, keys.v_columns + key * D, room.dscores, n, D);
    for (int64_t r = 0; r < rows; r++)
      differentiate_row(room.scores + r * kStep, room.dscores + r * kStep, panel, strips[r / kTileRows],
                        {room.span[r].first - key, room.span[r].end - key}, room.lse[r], room.delta[r], softcap);
    add_seen(strips, rows, panel, room.dscores, keys.k_rows + key * kStep, key_panel, room.dq, n, D);
    for (int64_t p = 0; p * kStep < n; p++) {
      // The rows whose strips see this panel: some in a row, since later rows see later keys.
      int64_t strip = 0, strips_end = (rows + kTileRows - 1) / kTileRows;
      while (strip < strips_end && strips[strip].end_panel <= p) strip++;
      while (strip < strips_end && strips[strips_end - 1].first_panel > p) strips_end--;
      const int64_t row = strip * kTileRows, depth = min64(strips_end * kTileRows, rows) - row;
      if (depth <= 0) continue;
      const int64_t at = p * panel + row * kStep, to = (key + p * kStep) * kStep;
      add_transposed(room.scores + at, room.dout + row * kStep, panel, dv + to, key_panel, D, depth);
      add_transposed(room.dscores + at, room.q + row * kStep, panel, dk + to, key_panel, D, depth);
    }
  }
}

template <class T, class S>
void store_dq(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t row, int64_t rows, const Room<S>& room) {
  constexpr int64_t kStep = kPanel<S>, kAhead = 8;
  const int64_t D = a.shape.D, panel = kRows * kStep;
  const auto of = [&](int64_t r) {
    return row_of(static_cast<T*>(a.dq), contiguous(a.shape.T, a.shape.H, D), s, head, row + r);
  };
  for (int64_t r = 0; r < rows; r++) {
    if (r + kAhead < rows) prefetch_row<true>(of(r + kAhead), D);
    for (int64_t d = 0; d < D; d += kStep) {
      const S* from = room.dq + d / kStep * panel + r * kStep;
      for_lanes<T, 1>(min64(kStep, D - d), [&](int64_t i, auto m, auto) {
        store(of(r) + d + i, load(from + i, m) * S(a.shape.scale), m);
      });
    }
  }
}

// The rows [row, end) of one KV head.
template <class T, class S>
void differentiate_rows(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t row, int64_t end,
                        const PackedKeys<S>& keys, const Room<S>& room, S* dk, S* dv) {
  for (; row < end; row += kBlocks * kRows) {
    const int64_t blocks = min64(kBlocks, (end - row + kRows - 1) / kRows);
    const auto rows = [&](int64_t block) { return min64(kRows, end - row - block * kRows); };
    for (int64_t i = 0; i < blocks; i++) prepare_block<T, S>(a, s, head, row + i * kRows, rows(i), room.from(i));
    const Span seen = span_of(a.shape, s, row, min64(kBlocks * kRows, end - row));
    const int64_t step = keys_together(a.shape.D);
    for (int64_t key = seen.first / kPanel<S> * kPanel<S>; key < seen.end; key += step)
      for (int64_t i = 0; i < blocks; i++)
        differentiate_block<S>(a.shape, rows(i), key, key + step, keys, room.from(i), dk, dv);
    for (int64_t i = 0; i < blocks; i++) store_dq<T, S>(a, s, head, row + i * kRows, rows(i), room.from(i));
  }
}

// Packed rows and keys that belong to no sequence have no gradient.
template <class T>
void zero_unowned(const AttentionBwd& a) {
  const AttentionShape& shape = a.shape;
  if (!shape.cu_q) return;
  const int64_t D = shape.D, q_first = shape.cu_q[shape.B], k_first = shape.cu_k[shape.B];
  const int64_t q_at = q_first * shape.H * D, q_rest = (shape.T - q_first) * shape.H * D;
  const int64_t k_at = k_first * shape.Hkv * D, k_rest = (shape.S - k_first) * shape.Hkv * D;
  if (q_rest > 0) memset(static_cast<T*>(a.dq) + q_at, 0, size_t(q_rest) * sizeof(T));
  if (k_rest > 0) memset(static_cast<T*>(a.dk) + k_at, 0, size_t(k_rest) * sizeof(T));
  if (k_rest > 0) memset(static_cast<T*>(a.dv) + k_at, 0, size_t(k_rest) * sizeof(T));
  using S = ScalarOf<T>;
  for (int64_t h = 0; h < shape.H && a.delta; h++)
    for (int64_t t = q_first; t < shape.T; t++)
      static_cast<S*>(a.delta)[h * shape.T + t] = a.dlse ? -static_cast<const S*>(a.dlse)[h * shape.T + t] : S(0);
}

// dsink = - sum over the queries of exp(sink - lse) * delta
template <class S>
void differentiate_sinks(const AttentionBwd& a) {
  const AttentionShape& shape = a.shape;
  const int64_t batch = shape.cu_q ? 1 : shape.B;
  parallel_for(shape.H, batch * shape.H * shape.T, [&](int64_t begin, int64_t end, int) {
    for (int64_t h = begin; h < end; h++) {
      const S sink = static_cast<const S*>(a.sinks)[h];
      double sum = 0;
      for (int64_t b = 0; b < batch; b++) {
        const int64_t at = (b * shape.H + h) * shape.T;
        for (int64_t t = 0; t < shape.T; t++) {
          const S lse = static_cast<const S*>(a.lse)[at + t];
          if (lse > -__builtin_inff()) sum -= exp2((sink - lse) * kLog2E<S>) * static_cast<const S*>(a.delta)[at + t];
        }
      }
      static_cast<S*>(a.dsinks)[h] = S(sum);
    }
  });
}

template <class T>
void bwd(const AttentionBwd& a) {
  using S = ScalarOf<T>;
  using V = VecOf<S>;
  const AttentionShape& shape = a.shape;
  constexpr int64_t kStep = kPanel<S>;
  const int64_t D = shape.D, heads = shape.B * shape.Hkv;
  zero_unowned<T>(a);

  // Head j is number j % Hkv of sequence j / Hkv. Its keys in four forms, then every task's dk and dv.
  const auto sequence = [&](int64_t j) { return sequence_of(shape, j / shape.Hkv); };
  const int64_t per_head = (kTasks + heads - 1) / max64(heads, 1);
  const auto task_rows = [&](int64_t j) {
    const int64_t rows = max64(kTaskRows, (sequence(j).rows() + per_head - 1) / per_head);
    return round_up(rows, kRows);
  };
  const auto tasks = [&](int64_t j) { return max64((sequence(j).rows() + task_rows(j) - 1) / task_rows(j), 1); };
  const auto padded = [&](int64_t j) { return round_up(sequence(j).S, kStep); };
  const auto packed_size = [&](int64_t j) { return 2 * padded(j) * D + panels_size<S>(padded(j), D); };
  const auto size = [&](int64_t j) { return packed_size(j) + 2 * tasks(j) * panels_size<S>(padded(j), D); };

  int64_t count = 0, work = 0;
  for (int64_t j = 0; j < heads; j++) {
    count += tasks(j);
    work += sequence(j).rows() * sequence(j).S * D;
  }
  const int64_t budget = kWaveBytes / int64_t(sizeof(S)), shared = largest_wave(heads, budget, size);
  const int64_t own = round_up(Room<S>::size(D), 16);
  const int64_t jobs_size = round_up((heads + 1) * int64_t(sizeof(Job) / sizeof(S)), 16);
  const int threads = threads_for(count, work / 8);
  S* const memory = static_cast<S*>(scratch(size_t(shared + jobs_size + threads * own) * sizeof(S)));
  Job* const jobs = reinterpret_cast<Job*>(memory + shared);
  S* const rooms = memory + shared + jobs_size;

#pragma omp parallel num_threads(threads)
  {
    const Room<S> room(rooms + omp_get_thread_num() * own, D);
    const auto keys = [&](int64_t j) {
      S* at = memory + jobs[j].offset;
      return PackedKeys<S>{padded(j), at, at + padded(j) * D, at + 2 * padded(j) * D, nullptr};
    };
    // dk of a task, dv behind it
    const auto sums = [&](int64_t j, int64_t task) {
      return memory + jobs[j].offset + packed_size(j) + 2 * task * panels_size<S>(padded(j), D);
    };
    // The panels of keys that a task's rows see: what there is of its sums.
    const auto seen_by = [&](int64_t j, int64_t task) {
      const Sequence s = sequence(j);
      const int64_t row = task * task_rows(j), rows = min64(task_rows(j), s.rows() - row);
      const Span seen = rows > 0 ? span_of(shape, s, row, rows) : Span{0, 0};
      return Span{seen.first / kStep * kStep, round_up(seen.end, kStep)};
    };
    for (int64_t begin = 0; begin < heads;) {
      const int64_t end = wave_end(begin, heads, budget, size);
#pragma omp single
      {
        Job next{0, 0};
        for (int64_t j = begin; j <= end; j++) {
          jobs[j] = next;
          if (j == end) break;
          next.offset += size(j);
          next.task += tasks(j);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t j = begin; j < end; j++) {
        const Sequence s = sequence(j);
        if (s.rows() == 0) continue;
        const Span seen = span_of(shape, s, 0, s.rows());
        if (seen.first == seen.end) continue;
        pack_keys(keys_of<T>(shape, a.k, a.v, s, j / shape.Hkv, j % shape.Hkv), seen, D, keys(j), room.pack);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t number = 0; number < jobs[end].task; number++) {
        const int64_t j = job_of(jobs, begin, end, number), task = jobs[j + 1].task - 1 - number;
        const Sequence s = sequence(j);
        S *dk = sums(j, task), *dv = dk + panels_size<S>(padded(j), D);
        const Span seen = seen_by(j, task);
        for (S* sum = dk; sum < dk + 2 * panels_size<S>(padded(j), D); sum += padded(j) * kStep)
          memset(sum + seen.first * kStep, 0, size_t((seen.end - seen.first) * kStep) * sizeof(S));
        const int64_t last = min64((task + 1) * task_rows(j), s.rows());
        differentiate_rows<T, S>(a, s, j % shape.Hkv, task * task_rows(j), last, keys(j), room, dk, dv);
      }
#pragma omp for schedule(static)
      for (int64_t part = begin * kSlices; part < end * kSlices; part++) {
        const int64_t j = part / kSlices, slice = part % kSlices;
        const Sequence s = sequence(j);
        const int64_t panel = padded(j) * kStep, matrix = panels_size<S>(padded(j), D), count = tasks(j);
        const S factor = S(shape.softcap != 0 ? shape.softcap : kLn2<double>);  // what undoes unit_of(): scale is left
        Span seen[kTasks];
        for (int64_t task = 0; task < count; task++) seen[task] = seen_by(j, task);
        for (int64_t key = s.S * slice / kSlices; key < s.S * (slice + 1) / kSlices; key++)
          for (int64_t d = 0; d < D; d += kStep) {
            const int64_t row = ((s.b * shape.S + s.k_row + key) * shape.Hkv + j % shape.Hkv) * D + d;
            const S* from = sums(j, 0) + d / kStep * panel + key * kStep;
            for_lanes<T, 1>(min64(kStep, D - d), [&](int64_t i, auto m, auto) {
              V dk = {}, dv = {};
              for (int64_t task = 0; task < count; task++) {
                if (key < seen[task].first || key >= seen[task].end) continue;
                dk += load(from + 2 * task * matrix + i, m);
                dv += load(from + (2 * task + 1) * matrix + i, m);
              }
              store(static_cast<T*>(a.dk) + row + i, dk * factor, m);
              store(static_cast<T*>(a.dv) + row + i, dv, m);
            });
          }
      }
      begin = end;
    }
  }
  if (a.dsinks) differentiate_sinks<S>(a);
}

}  // namespace

void attention_bwd(const AttentionBwd& a) {
  switch (a.shape.dtype) {
    case kFloat32: return bwd<float>(a);
    case kBFloat16: return bwd<bf16>(a);
    case kFloat16: return bwd<f16>(a);
    case kFloat64: return bwd<double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
