// A token for every row of logits, in one launch: temperature, top-k, top-p, min-p, and a draw by a given number u.
//
// A token weighs w = floor(2^44 exp((z - top) / temperature)), an integer: sums of integers don't depend on their
// order, so that threads may add as they come, and every run draws the same. 2^-44 of the likeliest token is lost on nobody.
//
//   top-k   keep z if fewer than k tokens have more                                  (ties with the k-th stay)
//   top-p   of these keep z if those with more weigh less than top_p of all;         (of ties the last ones stay, as
//           that is what an ascending sort and "drop while the sum is <= 1 - p" do    in a stable sort)
//   min-p   keep z if exp((z - top) / temperature) >= min_p
//   draw    the first token at which the running sum of kept weights exceeds u times their sum
//
// Nothing is sorted. The two thresholds are found the same way: where, from the largest logit down, does a running sum
// (of ones, or of weights) reach what is needed? Bins of 1/8 in (top - z) / temperature tell it roughly, with one pass
// for both. The logits of one bin, seldom more than a few hundred, are then put into shared memory and told apart by
// their bits, eight at a time. Without top-k and top-p there is no threshold to find.
//
// One block a row. A row is read once for its maximum, once for the bins, once for each threshold (and once between the
// two), once for the sums of 32 parts; the part in which the draw ends is read once more. NaN counts as -inf; +inf
// takes all; a row with nothing but -inf gives token 0.
//
// Bytes, the floor: sizeof(T) a logit. Passes but the first find the row in L2.
#include "sampling/sampling_cuda.h"

#include "common/launch.cuh"
#include "common/row.cuh"

namespace pyllm {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kBins = 256, kDigit = 8, kKeyBits = 32;
constexpr int kMembers = 4096;   // logits of one bin that shared memory holds
constexpr float kPerUnit = 8.f;  // bins in one unit of (top - z) / temperature: those from 31.9 on share the last
constexpr float kOne = 17592186044416.f;  // 2^44

// Orders as the numbers do, -0 like 0.
__device__ __forceinline__ uint32_t key_of(float z) {
  const uint32_t bits = __float_as_uint(z + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Weights {
  float top, temperature, min_p;

  __device__ __forceinline__ float distance(float z) const { return z == top ? 0.f : (top - z) / temperature; }
  // Of a logit that is not NaN.
  __device__ __forceinline__ uint64_t operator()(float z) const { return uint64_t(kOne * expf(-distance(z))); }
  __device__ __forceinline__ bool likely(float z) const { return min_p <= 0.f || expf(-distance(z)) >= min_p; }
  __device__ __forceinline__ int bin(float z) const {
    const float d = distance(z) * kPerUnit;
    return d < float(kBins - 1) ? int(d) : kBins - 1;
  }
};

// A row as slots in the order of its columns: the single elements in front, vectors, the single elements behind.
template <class T>
struct Slots {
  static constexpr int V = Row<T>::V;
  const T* x;
  Row<T> row;

  __device__ __forceinline__ Slots(const T* x, int n) : x(x), row(x, n, x) {}
  __device__ __forceinline__ int count() const { return row.vectors + 2; }
  // f(value, column) for the elements of one slot; NaN comes as -inf.
  template <class F>
  __device__ __forceinline__ void visit(int slot, const F& f) const {
    if (slot >= 1 && slot <= row.vectors) {
      const int first = row.lead + (slot - 1) * V;
      const Vec<T, V> v = Vec<T, V>::load(x + first);
#pragma unroll
      for (int j = 0; j < V; j++) f(v[j] == v[j] ? v[j] : -INFINITY, first + j);
    } else {
      for (int i = slot ? row.lead : 0; i < (slot ? row.singles : row.lead); i++) {
        const float z = element(x + row.single(i));
        f(z == z ? z : -INFINITY, row.single(i));
      }
    }
  }
  // All of them, by all threads of the block, in any order.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int slot = threadIdx.x; slot < count(); slot += kThreads) visit(slot, f);
  }
};

struct Scratch {
  unsigned long long count[kBins], mass[kBins];
  unsigned long long sums[2][kWarps];
  float tops[kWarps];
  unsigned long long above;    // what find() passed by
  int bin;
  unsigned members;
  uint32_t member[kMembers];
};

// ---- over the block ------------------------------------------------------------------------------------------------
__device__ __forceinline__ float block_max(float x, float (&of_warp)[kWarps]) {
  for (int lanes = kWarp / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = of_warp[threadIdx.x % kWarp];
  for (int lanes = kWarp / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// Sum over the lanes up to this one.
__device__ __forceinline__ unsigned long long warp_running(unsigned long long x) {
  const int lane = threadIdx.x % kWarp;
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, x, lanes);
    if (lane >= lanes) x += before;
  }
  return x;
}

// Sum over the threads before this one. Two calls in turn need two buffers.
__device__ __forceinline__ unsigned long long block_before(unsigned long long x, unsigned long long (&of_warp)[kWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned long long running = warp_running(x);
  if (lane == kWarp - 1) of_warp[warp] = running;
  __syncthreads();
  const unsigned long long warps = warp_running(of_warp[lane]);
  const unsigned long long before = __shfl_sync(kAllLanes, warps, (warp + kWarp - 1) % kWarp);
  return running - x + (warp ? before : 0);
}

// The bin, from the last one down or from the first one up, at which the running sum reaches `need`, which the sum over
// all does. Everybody comes and learns of it: s.bin, s.above.
__device__ __forceinline__ void find(Scratch& s, const unsigned long long (&bins)[kBins], unsigned long long need,
                                     bool upwards) {
  constexpr int kEach = kBins / kWarp;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    unsigned long long mine = 0;
    for (int i = 0; i < kEach; i++) {
      const int at = threadIdx.x * kEach + i;
      mine += bins[upwards ? at : kBins - 1 - at];
    }
    unsigned long long before = warp_running(mine) - mine;
    if (before < need && need <= before + mine) {  // one lane
      for (int i = 0; i < kEach; i++) {
        const int at = upwards ? threadIdx.x * kEach + i : kBins - 1 - (threadIdx.x * kEach + i);
        if (need <= before + bins[at]) {
          s.bin = at;
          s.above = before;
          break;
        }
        before += bins[at];
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void clear(Scratch& s) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) s.count[i] = s.mass[i] = 0;
  if (threadIdx.x == 0) s.members = 0;
  __syncthreads();
}

// Adds to bins what comes in a row for one bin at once: threads that see the same again and again needn't queue.
struct Adder {
  Scratch& s;
  int bin = -1;
  unsigned long long count = 0, mass = 0;

  __device__ __forceinline__ explicit Adder(Scratch& s) : s(s) {}
  __device__ __forceinline__ void flush() {
    if (count) {
      atomicAdd(&s.count[bin], count);
      if (mass) atomicAdd(&s.mass[bin], mass);
    }
    count = mass = 0;
  }
  __device__ __forceinline__ void add(int to, unsigned long long weight) {
    if (to != bin) flush();
    bin = to;
    count++;
    mass += weight;
  }
};

// ---- a threshold ---------------------------------------------------------------------------------------------------
// Where the running sum reaches what is needed.
struct Threshold {
  uint32_t key;                      // the least that stays
  unsigned long long above, ties;    // what weighs more; how many are just so
};

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The logits of bin s.bin (their keys at least `least`) told apart by their bits; `need` counts from the row's largest,
// s.above of it lie above the bin. by_mass: sums of weights, else of ones.
template <class T>
__device__ __forceinline__ Threshold refine(Scratch& s, const Slots<T>& slots, const Weights& weigh, uint32_t least,
                                            unsigned long long need, bool by_mass) {
  const int bin = s.bin;
  unsigned long long above = s.above;
  clear(s);
  slots.each([&](float z, int) {
    if (weigh.bin(z) != bin || key_of(z) < least) return;
    const unsigned at = atomicAdd(&s.members, 1u);
    if (at < kMembers) s.member[at] = key_of(z);
  });
  __syncthreads();
  const unsigned members = s.members;
  uint32_t prefix = 0, known = 0;  // bits of the threshold's key found so far, and which ones they are
  for (int shift = kKeyBits - kDigit; shift >= 0; shift -= kDigit) {
    __syncthreads();
    clear(s);
    Adder adder(s);
    const auto sort = [&](uint32_t key) {
      if ((key & known) == prefix) adder.add(key >> shift & (kBins - 1), by_mass ? weigh(value_of(key)) : 0);
    };
    if (members <= kMembers) {
      for (unsigned i = threadIdx.x; i < members; i += kThreads) sort(s.member[i]);
    } else {
      slots.each([&](float z, int) {
        if (weigh.bin(z) == bin && key_of(z) >= least) sort(key_of(z));
      });
    }
    adder.flush();
    find(s, by_mass ? s.mass : s.count, need - above, false);
    above += s.above;
    prefix |= uint32_t(s.bin) << shift;
    known |= uint32_t(kBins - 1) << shift;
  }
  return {prefix, above, s.count[prefix & (kBins - 1)]};
}

// What top-k and top-p leave of a row: keys above `least`, and of those equal to it all but the first `dropped`.
struct Kept {
  uint32_t least = 0;
  unsigned long long dropped = 0;
};

template <class T>
__device__ __forceinline__ Kept thresholds(Scratch& s, const Slots<T>& slots, const Weights& weigh, const Sampling& a) {
  Kept kept;
  clear(s);
  Adder adder(s);
  slots.each([&](float z, int) { adder.add(weigh.bin(z), weigh(z)); });
  adder.flush();
  __syncthreads();
  // The bins are needed again, in registers: a thread of the first 256 keeps one.
  const unsigned long long mine = threadIdx.x < kBins ? s.mass[threadIdx.x] : 0;
  int last = kBins - 1;                 // bin of the least token that top-k leaves
  unsigned long long in_last = 0;       // what top-k leaves of that bin
  const bool by_count = a.top_k < a.vocab;
  if (by_count) {
    find(s, s.count, a.top_k, true);
    last = s.bin;
    const Threshold k = refine(s, slots, weigh, 0, a.top_k, false);
    kept.least = k.key;
    __syncthreads();
    clear(s);
    if (a.top_p < 1.0) {
      Adder left(s);
      slots.each([&](float z, int) {
        if (weigh.bin(z) == last && key_of(z) >= kept.least) left.add(0, weigh(z));
      });
      left.flush();
      __syncthreads();
      in_last = s.mass[0];
    }
  }
  if (a.top_p >= 1.0) return kept;
  __syncthreads();
  if (threadIdx.x < kBins) {
    const int bin = threadIdx.x;
    s.mass[bin] = bin < last || !by_count ? mine : bin == last ? in_last : 0;
  }
  __syncthreads();
  unsigned long long total = 0;
  for (int i = threadIdx.x % kWarp; i < kBins; i += kWarp) total += s.mass[i];
  total = __shfl_sync(kAllLanes, warp_running(total), kWarp - 1);
  unsigned long long off = static_cast<unsigned long long>((1.0 - a.top_p) * double(total));
  if (off > total - 1) off = total - 1;  // one token always stays
  const unsigned long long need = total - off;
  find(s, s.mass, need, true);
  const Threshold p = refine(s, slots, weigh, kept.least, need, true);
  kept.least = p.key;
  const unsigned long long each = weigh(value_of(p.key));
  kept.dropped = p.ties - (need - p.above + each - 1) / each;
  return kept;
}

// ---- the draw ------------------------------------------------------------------------------------------------------
// Sums over a stretch of the row: of the tokens above the threshold, and how many stand at it.
struct Stretch {
  unsigned long long mass = 0, ties = 0;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Sampling a) {
  __shared__ Scratch s;
  const int64_t row = blockIdx.x;
  const Slots<T> slots(static_cast<const T*>(a.logits) + row * a.stride, int(a.vocab));
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  float top = -INFINITY;
  slots.each([&](float z, int) { top = fmaxf(top, z); });
  top = block_max(top, s.tops);
  if (top == -INFINITY) {
    if (thread == 0) a.tokens[row] = 0;
    return;
  }
  const Weights weigh = {top, a.temperature, a.min_p};
  Kept kept;
  if (a.top_k < a.vocab || a.top_p < 1.0) kept = thresholds(s, slots, weigh, a);
  const auto add = [&](Stretch& to, float z) {
    const uint32_t key = key_of(z);
    if (key < kept.least || !weigh.likely(z)) return;
    if (key == kept.least) to.ties++;
    else to.mass += weigh(z);
  };
  const unsigned long long at_least = kept.least ? weigh(value_of(kept.least)) : 0;
  // Of `ties` in a stretch, with `before` of them in front of it, those that aren't dropped.
  const auto staying = [&](unsigned long long before, unsigned long long ties) {
    const unsigned long long gone = kept.dropped > before ? kept.dropped - before : 0;
    return gone < ties ? ties - gone : 0;
  };

  // Every warp has a part of the row.
  const auto part = [&](int i) { return int(int64_t(slots.count()) * i / kWarps); };
  Stretch mine;
  for (int slot = part(warp) + lane; slot < part(warp + 1); slot += kWarp)
    slots.visit(slot, [&](float z, int) { add(mine, z); });
  mine.mass = warp_running(mine.mass);
  mine.ties = warp_running(mine.ties);
  __syncthreads();
  if (lane == kWarp - 1) {
    s.sums[0][warp] = mine.mass;
    s.sums[1][warp] = mine.ties;
  }
  __syncthreads();
  unsigned long long total = 0, ties = 0;
  for (int i = 0; i < kWarps; i++) {
    total += s.sums[0][i] + staying(ties, s.sums[1][i]) * at_least;
    ties += s.sums[1][i];
  }
  unsigned long long target = static_cast<unsigned long long>(a.uniform[row] * double(total));
  if (target > total - 1) target = total - 1;
  int chosen = 0;
  ties = 0;
  for (; chosen < kWarps - 1; chosen++) {
    const unsigned long long of_part = s.sums[0][chosen] + staying(ties, s.sums[1][chosen]) * at_least;
    if (target < of_part) break;
    target -= of_part;
    ties += s.sums[1][chosen];
  }

  // And every thread a piece of the part in which the draw ends.
  const int first = part(chosen), each = (part(chosen + 1) - first + kThreads - 1) / kThreads;
  const int begin = min(first + thread * each, part(chosen + 1)), end = min(begin + each, part(chosen + 1));
  Stretch piece;
  for (int slot = begin; slot < end; slot++) slots.visit(slot, [&](float z, int) { add(piece, z); });
  __syncthreads();
  ties += block_before(piece.ties, s.sums[1]);
  const unsigned long long of_piece = piece.mass + staying(ties, piece.ties) * at_least;
  const unsigned long long before = block_before(of_piece, s.sums[0]);
  if (target < before || target >= before + of_piece) return;
  unsigned long long running = before;
  int64_t token = -1;
  for (int slot = begin; slot < end; slot++) {
    slots.visit(slot, [&](float z, int column) {
      Stretch one;
      add(one, z);
      running += one.mass + staying(ties, one.ties) * at_least;
      ties += one.ties;
      if (token < 0 && target < running) token = column;
    });
  }
  a.tokens[row] = token;
}

}  // namespace

int sample(const Sampling& a, void* stream) {
  if (a.rows == 0) return 0;
  if (a.rows > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  return dispatch(a.dtype, [&](auto t) {
    return launch(sample_kernel<typename decltype(t)::type>, dim3(unsigned(a.rows)), dim3(kThreads), stream, a);
  });
}

}  // namespace pyllm
