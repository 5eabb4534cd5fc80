// Attention's forward on the CPU: tiled online softmax (Rabe and Staats 2021; Dao et al. 2022). Shapes: attention_cpu.h.
//
// The keys and values of a head are brought into panels of float32 once, for all queries and heads that share them.
// A task is a block of rows (queries of all heads of a group, see sequences.h): it goes through the keys in blocks whose
// scores never leave the second-level cache. All arithmetic is float32 (float64 for float64), whatever is stored.
//
// FLOPs: 4 D for a pair of query and key; 2 * kTileRows * 2 * lanes of them at a time are in flight in registers.
#include "blocks.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRows = 96, kKeys = 128;
#else
constexpr int64_t kRows = 48, kKeys = 128;
#endif
constexpr int64_t kStrips = (kRows + kTileRows - 1) / kTileRows;

// Up to so many rows of a sequence, attend()'s loops over unpacked keys are faster.
constexpr int64_t kFewRows = 8;

// Scores of one row over its strip's panels become 2^(score - m), 0 where it doesn't see; m, l and out follow.
template <class S>
void soften_row(S* scores, int64_t panel, const Strip& strip, Span seen, S softcap, S* m, S* l, S* out, int64_t D) {
  using V = VecOf<S>;
  constexpr int kLanes = Compute<S>::kLanes;
  constexpr int64_t kStep = kPanel<S>;
  const S none = -__builtin_inff();
  V top[2] = {splat<V>(-__builtin_inff()), splat<V>(-__builtin_inff())};
  for (int64_t p = strip.first_panel; p < strip.end_panel; p++) {
    const int64_t key = p * kStep;
    const bool whole = seen.first <= key && key + kStep <= seen.end;
    if (whole && softcap == 0) {
      for (int x = 0; x < 2; x++) top[x] = max(top[x], load(scores + p * panel + x * kLanes, Full{}));
      continue;
    }
    for (int x = 0; x < 2; x++) {
      S* at = scores + p * panel + x * kLanes;
      V s = load(at, Full{});
      if (softcap != 0) s = tanh(s) * softcap;
      if (!whole) s = inside(s, key + x * kLanes, seen.first, seen.end, none);
      store(at, s, Full{});
      top[x] = max(top[x], s);
    }
  }
  const S before = *m, highest = hmax(max(top[0], top[1]));
  *m = highest > before ? highest : before;
  const S base = *m == none ? S(0) : *m;  // a row that has seen nothing yet: 2^(-inf - 0) is 0
  V sum[2] = {};
  for (int64_t p = strip.first_panel; p < strip.end_panel; p++)
    for (int x = 0; x < 2; x++) {
      S* at = scores + p * panel + x * kLanes;
      const V e = exp2(load(at, Full{}) - base);
      store(at, e, Full{});
      sum[x] += e;
    }
  if (*m != before && before != none) {
    const S fade = exp2(before - base);
    *l *= fade;
    for (int64_t d = 0; d < D; d += kStep, out += kRows * kStep)
      for (int x = 0; x < 2; x++) store(out + x * kLanes, load(out + x * kLanes, Full{}) * fade, Full{});
  }
  *l += hsum(sum[0] + sum[1]);
}

// Memory of a thread.
template <class S>
struct Room {
  S *q, *out, *scores, *m, *l, *pack;
  Span* span;

  static int64_t size(int64_t D) {
    return 2 * panels_size<S>(kRows, D) + kRows * kKeys + 2 * kRows + kPanel<S> * round_up(D, Compute<S>::kLanes) +
           kRows * int64_t(sizeof(Span) / sizeof(S));
  }
  Room(S* at, int64_t D) {
    q = at;
    out = q + panels_size<S>(kRows, D);
    scores = out + panels_size<S>(kRows, D);
    m = scores + kRows * kKeys;
    l = m + kRows;
    span = reinterpret_cast<Span*>(l + kRows);
    pack = reinterpret_cast<S*>(span + kRows);
  }
};

// One task: up to kRows rows from `row` on, against all keys that they see.
template <class T, class S>
void attend_block(const AttentionFwd& a, const Sequence& s, int64_t head, int64_t row, const PackedKeys<S>& keys,
                  const Room<S>& room) {
  const AttentionShape& shape = a.shape;
  constexpr int64_t kStep = kPanel<S>;
  const int64_t D = shape.D, rows = min64(kRows, s.rows() - row), panel = kRows * kStep;
  for (int64_t r = 0; r < rows; r++) {
    room.span[r] = span_of(shape, s, row + r);
    room.m[r] = a.sinks ? static_cast<const S*>(a.sinks)[head * s.group + (row + r) % s.group] * kLog2E<S>
                        : -__builtin_inff();
    room.l[r] = room.m[r] > -__builtin_inff() ? 1 : 0;
    pack_row(row_of(static_cast<const T*>(a.q), shape.q_stride, s, head, row + r), shape.q_stride.d, D,
             unit_of<S>(shape), room.q, panel, r);
  }
  for (int64_t r = 0; r < rows; r++) {
    prefetch_row<true>(row_of(static_cast<T*>(a.out), contiguous(shape.T, shape.H, D), s, head, row + r), D);
    if (row >= kRows)  // very likely the next task
      prefetch_row<false>(row_of(static_cast<const T*>(a.q), shape.q_stride, s, head, row + r - kRows), D);
  }
  memset(room.out, 0, size_t(panels_size<S>(kRows, D)) * sizeof(S));
  const S softcap = S(shape.softcap) * kLog2E<S>;
  const Span seen = {room.span[0].first, room.span[rows - 1].end};
  for (int64_t key = seen.first / kStep * kStep; key < seen.end; key += kKeys) {
    const int64_t n = min64(kKeys, seen.end - key);
    Strip strips[kStrips];
    cut_strips<S>(room.span, rows, key, n, strips);
    multiply_seen(strips, rows, panel, room.q, keys.k_columns + key * D, room.scores, n, D);
    for (int64_t r = 0; r < rows; r++) {
      const Strip& strip = strips[r / kTileRows];
      if (strip.first_panel < strip.end_panel)
        soften_row(room.scores + r * kStep, panel, strip, {room.span[r].first - key, room.span[r].end - key}, softcap,
                   room.m + r, room.l + r, room.out + r * kStep, D);
    }
    add_seen(strips, rows, panel, room.scores, keys.v_rows + key * kStep, keys.rows * kStep, room.out, n, D);
  }
  for (int64_t r = 0; r < rows; r++) {
    const S factor = normaliser(room.l[r]);
    T* to = row_of(static_cast<T*>(a.out), contiguous(shape.T, shape.H, D), s, head, row + r);
    for (int64_t d = 0; d < D; d += kStep) {
      const S* from = room.out + d / kStep * panel + r * kStep;
      for_lanes<T, 1>(min64(kStep, D - d), [&](int64_t i, auto m, auto) {
        store(to + d + i, load(from + i, m) * factor, m);
      });
    }
    if (a.lse) static_cast<S*>(a.lse)[lse_of(shape, s, head, row + r)] = lse_from(room.m[r], room.l[r]);
  }
}

template <class T>
void fwd(const AttentionFwd& a) {
  using S = ScalarOf<T>;
  const AttentionShape& shape = a.shape;
  constexpr int64_t kStep = kPanel<S>;
  const int64_t D = shape.D, heads = shape.B * shape.Hkv;
  int64_t most = 0, work = 0;
  for (int64_t i = 0; i < shape.B; i++) {
    const Sequence s = sequence_of(shape, i);
    most = max64(most, s.rows());
    work += s.rows() * s.S * D * shape.Hkv;
  }
  if (most <= kFewRows) return attention_few(a);
  fill_unowned<T>(a);

  const auto padded = [&](int64_t j) { return round_up(sequence_of(shape, j / shape.Hkv).S, kStep); };
  const auto size = [&](int64_t j) { return padded(j) * D + panels_size<S>(padded(j), D); };
  const int64_t budget = kWaveBytes / int64_t(sizeof(S)), shared = largest_wave(heads, budget, size);
  const int64_t own = round_up(Room<S>::size(D), 16), jobs_size = round_up((heads + 1) * int64_t(sizeof(Job) / sizeof(S)), 16);
  const int threads = threads_for(heads * ((most + kRows - 1) / kRows), work / 8);
  S* const packed = static_cast<S*>(scratch(size_t(shared + jobs_size + threads * own) * sizeof(S)));
  Job* const jobs = reinterpret_cast<Job*>(packed + shared);
  S* const rooms = packed + shared + jobs_size;

#pragma omp parallel num_threads(threads)
  {
    const Room<S> room(rooms + omp_get_thread_num() * own, D);
    const auto keys = [&](int64_t j) {
      S* at = packed + jobs[j].offset;
      return PackedKeys<S>{padded(j), at, nullptr, nullptr, at + padded(j) * D};
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
          next.task += (sequence_of(shape, j / shape.Hkv).rows() + kRows - 1) / kRows;
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t j = begin; j < end; j++) {
        const Sequence s = sequence_of(shape, j / shape.Hkv);
        if (s.rows() == 0) continue;
        const Span seen = span_of(shape, s, 0, s.rows());
        if (seen.first == seen.end) continue;
        pack_keys(keys_of<T>(shape, a.k, a.v, s, j / shape.Hkv, j % shape.Hkv), seen, D, keys(j), room.pack);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < jobs[end].task; task++) {
        const int64_t j = job_of(jobs, begin, end, task);
        const Sequence s = sequence_of(shape, j / shape.Hkv);
        const int64_t block = jobs[j + 1].task - 1 - task;  // last rows first: under a causal mask they take longest
        attend_block<T, S>(a, s, j % shape.Hkv, block * kRows, keys(j), room);
      }
      begin = end;
    }
  }
}

}  // namespace

void attention_fwd(const AttentionFwd& a) {
  switch (a.shape.dtype) {
    case kFloat32: return fwd<float>(a);
    case kBFloat16: return fwd<bf16>(a);
    case kFloat16: return fwd<f16>(a);
    case kFloat64: return fwd<double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
