// A step of decoding: the newest tokens through the whole model, in one parallel region. Formulas: decode_cpu.h.
//
// What takes the time is reading every weight once. Around that the step must not lose any: there is one fork and join
// per step, five barriers per layer, and each thread takes the next few outputs of a matrix when it is done with its
// last ones, so that a core that is busy with something else does less instead of keeping the others waiting. Small
// things between the matrices (norms, rounding of inputs) every thread computes for itself rather than wait for them.
//
// The same bits for any number of threads: every output is one thread's sum, in an order of its own.
#include "decode_cpu.h"

#include <sched.h>

#include "../common/simd.h"
#include "attend.h"
#include "product.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr int64_t kOutputsPerTake = 2 * kBlock;

inline void relax() {
#if PYLLM_X86
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The threads of a step: who takes what, and the barrier between phases.
struct alignas(64) Counter {
  int64_t next;
};
struct Team {
  Counter arrived, phase_number;
  int threads;
  Counter* taken;  // one per phase, zero at first

  // Waits for all threads. Not by spinning for long: another program may have one of the cores, and OpenMP's own
  // barrier would then burn the rest of the time slice.
  void barrier() {
    if (threads == 1) return;
    const int64_t before = __atomic_load_n(&phase_number.next, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived.next, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived.next, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_number.next, before + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase_number.next, __ATOMIC_ACQUIRE) == before; spins++)
      spins < 4000 ? relax() : void(sched_yield());
  }
  int64_t take(int64_t phase) {
    if (threads == 1) return taken[phase].next++;
    return __atomic_fetch_add(&taken[phase].next, 1, __ATOMIC_RELAXED);
  }
};

// What all threads share. M = R T tokens.
struct Shared {
  float *x;    // (M, C) the residual stream
  float *qkv;  // (M, (H + 2 Hkv) D)
  float *h;    // (M, F)
  Parts parts;
  int64_t chunks;  // of the longest row
};

// What a thread has of its own.
struct Own {
  char* inputs;
  float *row, *tile, *tile2, *queries, *scores;
};

struct Sizes {
  int64_t M, widest, qkv;
  size_t inputs;
  explicit Sizes(const DecodeStep& s)
      : M(s.R * s.T), widest(max64(max64(s.C, s.F), s.H * s.D)), qkv((s.H + 2 * s.Hkv) * s.D),
        inputs(input_bytes(M, widest)) {}
};

// Hands out 64-byte aligned pieces of one block. Without a block it only counts.
struct Memory {
  char* base;
  size_t used = 0;
  template <class P>
  P* take(size_t count) {
    P* p = reinterpret_cast<P*>(base + used);
    used += (count * sizeof(P) + 63) / 64 * 64;
    return p;
  }
};

inline Own own(const DecodeStep& s, const Sizes& z, Memory& memory) {
  Own o;
  o.inputs = memory.take<char>(z.inputs);
  o.row = memory.take<float>(size_t(z.widest));
  o.tile = memory.take<float>(size_t(z.M * kOutputsPerTake));
  o.tile2 = memory.take<float>(size_t(z.M * kOutputsPerTake));
  o.queries = memory.take<float>(size_t(s.D));
  o.scores = memory.take<float>(size_t(kColumns));
  return o;
}

constexpr int64_t kPhases = 7;  // of a layer: q, k, v, attention, o, gate and up, down; the logits are one more

struct Layout {
  Team* team;
  Counter* taken;
  int64_t counters;
  Shared shared;
  char* own;  // of the first thread; the others' follow
  size_t own_bytes, bytes;

  Layout(const DecodeStep& s, const Sizes& z, int threads, char* base) {
    Memory memory{base};
    int64_t longest = 0;
    for (int64_t r = 0; r < s.R; r++) longest = max64(longest, s.ends[r]);
    const int64_t chunks = max64(1, (longest + kColumns - 1) / kColumns);
    counters = s.L * kPhases + 1;
    team = memory.take<Team>(1);
    taken = memory.take<Counter>(size_t(counters));
    shared.chunks = chunks;
    shared.x = memory.take<float>(size_t(z.M * s.C));
    shared.qkv = memory.take<float>(size_t(z.M * z.qkv));
    shared.h = memory.take<float>(size_t(z.M * s.F));
    shared.parts = {memory.take<float>(size_t(z.M * s.H * chunks * (s.D + 2))), chunks, s.T, s.H, s.D};
    own = memory.take<char>(0);
    Memory one{nullptr};
    ::pyllm::PYLLM_ISA::own(s, z, one);
    own_bytes = one.used;
    bytes = memory.used + size_t(threads) * own_bytes;
  }
};

// T: dtype of the embedding, norms, biases and the cache.
template <class T>
struct Worker {
  const DecodeStep& s;
  const Sizes& z;
  const Shared& shared;
  Team& team;
  Own own;
  int64_t phase = 0;

  // body(begin, end) over N outputs, as this thread gets hold of them
  template <class Body>
  void outputs(int64_t N, const Body& body) {
    for (int64_t begin; (begin = team.take(phase) * kOutputsPerTake) < N;) body(begin, min64(begin + kOutputsPerTake, N));
    phase++;
  }
  template <class Body>
  void pieces(int64_t count, const Body& body) {
    for (int64_t piece; (piece = team.take(phase)) < count;) body(piece);
    phase++;
  }

  // Inputs of a product from the rows that row(m, to) writes or that it returns.
  template <class Row>
  Inputs gather(int64_t kind, int64_t M, int64_t K, const Row& row) {
    const Inputs in = inputs_at(own.inputs, kind, M, K);
    for (int64_t m = 0; m < M; m++) put_row(in, kind, m, row(m, own.row));
    return in;
  }
  Inputs normed(int64_t kind, const void* weight) {
    return gather(kind, z.M, s.C, [&](int64_t m, float* to) {
      rms_norm_row(shared.x + m * s.C, static_cast<const T*>(weight), s.C, s.eps, to);
      return to;
    });
  }

  void run() {
    for (int64_t i = 0; i < s.L; i++) {
      layer(i);
      team.barrier();
    }
    logits();
  }

  void layer(int64_t i) {
    const DecodeLayer& l = s.layers[i];
    const Inputs in = normed(l.q.kind, l.input_norm);
    const int64_t n_q = s.H * s.D, n_kv = s.Hkv * s.D;
    project(l.q, n_q, in, 0);
    project(l.k, n_kv, in, n_q);
    project(l.v, n_kv, in, n_q + n_kv);
    team.barrier();

    pieces(s.R * s.Hkv * shared.chunks, [&](int64_t piece) {
      const int64_t row = piece / (s.Hkv * shared.chunks), rest = piece % (s.Hkv * shared.chunks);
      attend<T>(s, i, row, rest / shared.chunks, rest % shared.chunks, shared.qkv, shared.parts, own.queries, own.scores);
    });
    team.barrier();

    const Inputs attended = gather(l.o.kind, z.M, n_q, [&](int64_t m, float* to) {
      for (int64_t h = 0; h < s.H; h++)
        merge(shared.parts, m / s.T, m % s.T, h, s.ends[m / s.T], to + h * s.D);
      return to;
    });
    add(l.o, attended);
    team.barrier();

    const Inputs to_mlp = normed(l.gate.kind, l.post_norm);
    outputs(s.F, [&](int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      product(l.gate, begin, end, to_mlp, own.tile, n);
      product(l.up, begin, end, to_mlp, own.tile2, n);
      add_bias<T>(l.gate.bias, begin, end, z.M, own.tile, n);
      add_bias<T>(l.up.bias, begin, end, z.M, own.tile2, n);
      for (int64_t m = 0; m < z.M; m++)
        for_lanes<float, 1>(n, [&](int64_t j, auto part, auto) {
          const Vec gate = load(own.tile + m * n + j, part), up = load(own.tile2 + m * n + j, part);
          store(shared.h + m * s.F + begin + j, silu(gate) * up, part);
        });
    });
    team.barrier();

    add(l.down, gather(l.down.kind, z.M, s.F, [&](int64_t m, float*) { return shared.h + m * s.F; }));
  }

  // Columns [at, at + N) of qkv = W in + bias
  void project(const Matrix& w, int64_t N, const Inputs& in, int64_t at) {
    outputs(N, [&](int64_t begin, int64_t end) {
      float* to = shared.qkv + at + begin;
      product(w, begin, end, in, to, z.qkv);
      add_bias<T>(w.bias, begin, end, z.M, to, z.qkv);
    });
  }

  // x += W in + bias
  void add(const Matrix& w, const Inputs& in) {
    outputs(s.C, [&](int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      product(w, begin, end, in, own.tile, n);
      add_bias<T>(w.bias, begin, end, z.M, own.tile, n);
      for (int64_t m = 0; m < z.M; m++)
        for_lanes<float, 1>(n, [&](int64_t j, auto part, auto) {
          float* to = shared.x + m * s.C + begin + j;
          store(to, load(to, part) + load(own.tile + m * n + j, part), part);
        });
    });
  }

  void logits() {
    const int64_t kept = s.R * s.keep;
    const Inputs in = gather(s.head.kind, kept, s.C, [&](int64_t k, float* to) {
      const int64_t m = k / s.keep * s.T + (s.T - s.keep) + k % s.keep;
      rms_norm_row(shared.x + m * s.C, static_cast<const T*>(s.norm), s.C, s.eps, to);
      return to;
    });
    outputs(s.V, [&](int64_t begin, int64_t end) { product(s.head, begin, end, in, s.logits + begin, s.V); });
  }
};

// Below this many bytes of weights a second thread costs more (five barriers per layer) than it saves.
constexpr int64_t kSerialBytes = 1 << 20;

template <class T>
void step(const DecodeStep& s) {
  const Sizes z(s);
  const int threads = s.bytes < kSerialBytes ? 1 : max_threads();
  char* memory = static_cast<char*>(scratch(Layout(s, z, threads, nullptr).bytes));
  const Layout layout(s, z, threads, memory);
  memset(layout.taken, 0, size_t(layout.counters) * sizeof(Counter));
  *layout.team = Team{{0}, {0}, 1, layout.taken};
  for (int64_t m = 0; m < z.M; m++)
    for_lanes<float, 1>(s.C, [&](int64_t i, auto part, auto) {
      store(layout.shared.x + m * s.C + i, load(static_cast<const T*>(s.embedding) + s.ids[m] * s.C + i, part), part);
    });
  const auto work = [&](int thread) {
    Memory mine{layout.own + size_t(thread) * layout.own_bytes};
    Worker<T>{s, z, layout.shared, *layout.team, own(s, z, mine)}.run();
  };
  if (threads == 1) return work(0);
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    layout.team->threads = omp_get_num_threads();
    work(omp_get_thread_num());
  }
}

}  // namespace

void decode_step(const DecodeStep& s) {
  switch (s.dtype) {
    case kFloat32: return step<float>(s);
    case kBFloat16: return step<bf16>(s);
    case kFloat16: return step<f16>(s);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
