// Attention forward for Hopper (sm_90a), 16-bit types: what attention_fwd.cuh does, with the instructions that only these
// GPUs have. Three warpgroups of a block share the work (Shah et al. 2024, arXiv:2407.08608):
//
//   the first   one thread of it: has TMA copy q, then tile after tile of keys and values into two stages each
//   the others  64 queries each: S = Q K^T and O += P V by wgmma, scores to probabilities in registers
//
// The tensor cores must not wait for exponentials. Within a warpgroup P V of one tile runs while the next tile's scores,
// whose product was issued before it, become probabilities. And the two warpgroups take turns to issue products, so that
// one computes exponentials while the other multiplies:
//
//   warpgroup 1   Q K1 | softmax 1     | Q K2, P V1 | softmax 2     | Q K3, P V2 | ...
//   warpgroup 2        | Q K1          | softmax 1  | Q K2, P V1    | softmax 2  | ...
//
// Floor: as for attention_fwd.cuh, 4 D operations a visible pair at the tensor cores' rate; an exponential a pair at a
// 256th of that rate, which is as much time as the products take at D = 64, and half of it at D = 128.
#pragma once
#include "attention/softmax.cuh"
#include "attention/warp_tiles.cuh"
#include "common/hopper.cuh"
#include "common/launch.cuh"

namespace pyllm {

template <int C>
struct HopperTiles {
  static constexpr int kConsumers = 2, kRows = 64 * kConsumers, kKeys = C == 256 ? 64 : 128, kStages = 2;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers), kPanels = C / kPanelColumns;
  // A panel of 64 queries; all of a warpgroup's. A panel of keys or values; a stage of either.
  static constexpr int kQueryPanel = 64 * kPanelRow, kQueries = kPanels * kQueryPanel;
  static constexpr int kKeyPanel = kKeys * kPanelRow, kStage = kPanels * kKeyPanel;
  static constexpr int kTiles = kConsumers * kQueries + 2 * kStages * kStage;
  static constexpr int kShared = kPanelAlignment + kTiles + (1 + 4 * kStages) * int(sizeof(uint64_t));
  // A block starts with 168 registers for each of its threads, all that 65536 allow. That is its pool: who asks for
  // more than the others have left in it waits for ever.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8, kCopyingRegisters = 24, kMultiplyingRegisters = 240;
  static_assert(kCopyingRegisters + kConsumers * kMultiplyingRegisters <= (1 + kConsumers) * kRegisters);
};

// Where all is in shared memory. A stage is full when TMA has filled it, empty when all warps of consumers have read it.
template <int C>
struct HopperShared {
  using Shape = HopperTiles<C>;
  unsigned char* tiles;

  explicit __device__ __forceinline__ HopperShared(unsigned char* first) {
    const uint32_t past = uint32_t(reinterpret_cast<uintptr_t>(first)) % kPanelAlignment;
    tiles = first + (past ? kPanelAlignment - past : 0);
  }
  __device__ __forceinline__ unsigned char* queries(int consumer) const { return tiles + consumer * Shape::kQueries; }
  __device__ __forceinline__ unsigned char* keys(int stage) const {
    return tiles + Shape::kConsumers * Shape::kQueries + stage * Shape::kStage;
  }
  __device__ __forceinline__ unsigned char* values(int stage) const { return keys(Shape::kStages + stage); }

  __device__ __forceinline__ Mbarrier barrier(int i) const {
    return {reinterpret_cast<uint64_t*>(tiles + Shape::kTiles) + i};
  }
  __device__ __forceinline__ Mbarrier queries_full() const { return barrier(0); }
  __device__ __forceinline__ Mbarrier keys_full(int stage) const { return barrier(1 + stage); }
  __device__ __forceinline__ Mbarrier keys_empty(int stage) const { return barrier(1 + Shape::kStages + stage); }
  __device__ __forceinline__ Mbarrier values_full(int stage) const { return barrier(1 + 2 * Shape::kStages + stage); }
  __device__ __forceinline__ Mbarrier values_empty(int stage) const { return barrier(1 + 3 * Shape::kStages + stage); }
};

struct HopperMaps {
  TensorMap q, k, v;
};

// What one thread of the first warpgroup does.
template <int C>
__device__ __forceinline__ void copy_tiles(const HopperShared<C>& shared, const HopperMaps& maps, const Place& at,
                                           int kv_head, int begin, int end) {
  using Shape = HopperTiles<C>;
  shared.queries_full().arrive_expecting(Shape::kConsumers * Shape::kQueries);
  for (int w = 0; w < Shape::kConsumers; w++)
    for (int p = 0; p < Shape::kPanels; p++)
      fetch_box(shared.queries(w) + p * Shape::kQueryPanel, maps.q, shared.queries_full(), p * kPanelColumns, at.head,
                at.q_row0 + at.row + 64 * w, at.batch);
  auto fetch = [&](unsigned char* stage, const TensorMap& map, const Mbarrier& full, int j) {
    full.arrive_expecting(Shape::kStage);
    for (int p = 0; p < Shape::kPanels; p++)
      fetch_box(stage + p * Shape::kKeyPanel, map, full, p * kPanelColumns, kv_head, at.k_row0 + j, at.batch);
  };
  int stage = 0, round = 0;
  for (int j = begin; j < end; j += Shape::kKeys) {
    shared.keys_empty(stage).wait(round ^ 1);
    fetch(shared.keys(stage), maps.k, shared.keys_full(stage), j);
    shared.values_empty(stage).wait(round ^ 1);
    fetch(shared.values(stage), maps.v, shared.values_full(stage), j);
    if (++stage == Shape::kStages) stage = 0, round ^= 1;
  }
}

// Turns of the consumers at issuing products; barriers 1 and 2.
struct Turns {
  int mine;

  __device__ __forceinline__ void take() const { named_barrier_wait(1 + mine, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const { named_barrier_arrive(2 - mine, 2 * kWarpgroup); }
};
constexpr int kAllConsumers = 3, kOneConsumer = 4;  // barriers; of the latter one for each

// Of packed sequences TMA goes on reading beyond a sequence's end: what it finds there may be a NaN, which a probability
// of zero would not make harmless. Zeros for rows `count` and on of a stage of values; by all consumers together.
template <int C>
__device__ __forceinline__ void clear_values(unsigned char* stage, int count) {
  using Shape = HopperTiles<C>;
  constexpr int kThreads = Shape::kConsumers * kWarpgroup, kChunks = kPanelRow / 16;
  const int thread = threadIdx.x - kWarpgroup, rows = Shape::kKeys - count;
  for (int i = thread; i < Shape::kPanels * rows * kChunks; i += kThreads) {
    const int chunk = i % kChunks, row = i / kChunks % rows, panel = i / kChunks / rows;
    unsigned char* at = stage + panel * Shape::kKeyPanel + (count + row) * kPanelRow + chunk * 16;
    *reinterpret_cast<uint4*>(at) = uint4{0, 0, 0, 0};
  }
  stores_are_for_wgmma();
  named_barrier_wait(kAllConsumers, kThreads);
}

// s = q k^T, a group of products.
template <class T, int C, int N>
__device__ __forceinline__ void score_tile(float (&s)[N][4], const unsigned char* q, const unsigned char* k) {
  using Shape = HopperTiles<C>;
#pragma unroll
  for (int step = 0; step < C / 16; step++)
    wgmma_rows<T>(s, operand_of_rows(q, Shape::kQueryPanel, step), operand_of_rows(k, Shape::kKeyPanel, step), step > 0);
  wgmma_commit();
}

// acc += p v, another.
template <class T, int C, int kSteps>
__device__ __forceinline__ void add_values(float (&acc)[C / 8][4], const uint32_t (&p)[kSteps][4],
                                           const unsigned char* v) {
  using Shape = HopperTiles<C>;
  constexpr int kColumns = C == 64 ? 64 : 128, N = kColumns / 8;  // of one product
#pragma unroll
  for (int step = 0; step < kSteps; step++)
#pragma unroll
    for (int c = 0; c < C / kColumns; c++)
      wgmma_columns<T>(reinterpret_cast<float(&)[N][4]>(acc[c * N]), p[step],
                       operand_of_columns(v + c * (kColumns / kPanelColumns) * Shape::kKeyPanel, Shape::kKeyPanel, step));
  wgmma_commit();
}

// What a warpgroup of consumers does.
template <class T, int C>
__device__ __forceinline__ void attend_tiles(const HopperShared<C>& shared, const Attention& a, const Place& at, int rows,
                                             int begin, int end, bool out_vectors) {
  using Shape = HopperTiles<C>;
  constexpr int kKeys = Shape::kKeys, N = kKeys / 8, kSteps = kKeys / 16;
  const Span& span = at.span;
  const int thread = threadIdx.x, consumer = thread / kWarpgroup - 1, lane = thread % kWarp;
  const int row = 64 * consumer + thread / kWarp % 4 * 16;  // the warp's first, of the block's
  unsigned char* const q = shared.queries(consumer);
  const Turns turn{consumer};
  const Score score(a.scale, a.softcap);
  Softmax<1> softmax;
  float s[1][N][4], acc[1][C / 8][4] = {}, fade[1][2];
  uint32_t p[kSteps][4];

  auto probabilities = [&](int j) {  // of s; p is rounded when nobody multiplies by the old one any more
    score.of(s);
    if (!span.all_see(at.row, at.row + rows - 1, j, j + kKeys - 1)) hide_unseen(s, span, at.row + row, j);
    softmax.step(s, fade, score.unit);
  };
  auto round_them = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; step++) a_of_products<T>(p[step], s[0], step);
    pin(p);
  };

  if (begin < end) {
    if (consumer == 1) turn.pass();  // the other one begins
    shared.queries_full().wait(0);
    shared.keys_full(0).wait(0);
    turn.take();
    wgmma_begin();
    score_tile<T, C>(s[0], q, shared.keys(0));
    if (consumer == 0 || begin + kKeys < end) turn.pass();
    wgmma_wait<0>();
    pin(s[0]);
    if (lane == 0) shared.keys_empty(0).arrive();
    probabilities(begin);
    round_them();

    int stage = 0, round = 0;  // of the values to come next
    for (int j = begin + kKeys; j < end; j += kKeys) {
      const int next = stage + 1 == Shape::kStages ? 0 : stage + 1, next_round = next == 0 ? round ^ 1 : round;
      shared.keys_full(next).wait(next_round);
      shared.values_full(stage).wait(round);
      turn.take();
      pin(acc[0]);
      wgmma_begin();
      score_tile<T, C>(s[0], q, shared.keys(next));
      add_values<T, C>(acc[0], p, shared.values(stage));
      if (consumer == 0 || j + kKeys < end) turn.pass();
      wgmma_wait<1>();
      pin(s[0]);
      if (lane == 0) shared.keys_empty(next).arrive();
      probabilities(j);
      wgmma_wait<0>();
      pin(acc[0]);
      if (lane == 0) shared.values_empty(stage).arrive();
      softmax.rescale(acc, fade);
      round_them();
      stage = next, round = next_round;
    }
    shared.values_full(stage).wait(round);
    const int last = begin + (end - begin - 1) / kKeys * kKeys;
    if (a.cu_q && last + kKeys > span.S) clear_values<C>(shared.values(stage), span.S - last);
    pin(acc[0]);
    wgmma_begin();
    add_values<T, C>(acc[0], p, shared.values(stage));
    wgmma_wait<0>();
    pin(acc[0]);
    named_barrier_wait(kOneConsumer + consumer, kWarpgroup);  // all four warps are done with q
  }

  float factor[1][2], lse[1][2];
  softmax.finish(a.sinks ? a.sinks[at.head] * kLog2e : -kInfinity, score.unit, factor, lse);
  const int g = lane / 4, t = lane % 4;
  float* to = a.lse + lse_offset(a, at, at.head) + at.row;
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (t == 0 && row + g + 8 * i < rows) to[row + g + 8 * i] = lse[0][i] * kLn2;
  const AttentionStride dense = {a.T * a.H * a.D, a.H * a.D, a.D};
  T* out = head_of(static_cast<T*>(a.out), dense, at, at.q_row0 + at.row + row, at.head);
  store_rows<1>(acc, factor, Tile<T, C>{q}, row - 64 * consumer, out, dense.row, rows - row, int(a.D), out_vectors);
}

template <class T, int C>
__global__ void __launch_bounds__(HopperTiles<C>::kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ Attention a, const __grid_constant__ HopperMaps maps,
                            bool out_vectors) {
  using Shape = HopperTiles<C>;
  SHARED_DYNAMIC(bytes);
  const HopperShared<C> shared(bytes);
  const Place at = find_place<Shape::kRows, false>(a, int(a.H));
  const int rows = min(Shape::kRows, at.span.T - at.row);
  if (rows <= 0) return;
  const int begin = at.span.first_key(at.row) / Shape::kKeys * Shape::kKeys, end = at.span.end_key(at.row + rows - 1);

  if (threadIdx.x == 0) {
    shared.queries_full().init(1);
    for (int i = 0; i < Shape::kStages; i++) {
      shared.keys_full(i).init(1);
      shared.values_full(i).init(1);
      shared.keys_empty(i).init(4 * Shape::kConsumers);
      shared.values_empty(i).init(4 * Shape::kConsumers);
    }
    mbarriers_are_ready();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<Shape::kCopyingRegisters>();
    if (threadIdx.x == 0 && begin < end) copy_tiles<C>(shared, maps, at, int(at.head / (a.H / a.Hkv)), begin, end);
  } else {
    take_registers<Shape::kMultiplyingRegisters>();
    attend_tiles<T, C>(shared, a, at, rows, begin, end, out_vectors);
  }
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int C>
int attention_hopper_tiles(const Attention& a, void* stream) {
  using Shape = HopperTiles<C>;
  const int64_t blocks = blocks_for(a, Shape::kRows, a.H, false);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  HopperMaps maps;
  const int64_t batches = a.cu_q ? 1 : a.B;
  auto map = [&](TensorMap* to, const void* x, int64_t heads, int64_t rows, const AttentionStride& stride, int box_rows) {
    return encode(to, {x, a.D, heads, rows, batches, stride.head, stride.row, stride.batch, box_rows});
  };
  if (const int error = map(&maps.q, a.q, a.H, a.T, a.q_stride, 64)) return error;
  if (const int error = map(&maps.k, a.k, a.Hkv, a.S, a.k_stride, Shape::kKeys)) return error;
  if (const int error = map(&maps.v, a.v, a.Hkv, a.S, a.v_stride, Shape::kKeys)) return error;
  return launch_shared(attention_hopper_kernel<T, C>, dim3(unsigned(blocks)), dim3(Shape::kThreads), Shape::kShared,
                       stream, a, maps, heads_are_vectors<T>(a.out, {}, a.D));
}

template <class T>
int attention_hopper_tiled(const Attention& a, void* stream) {
  if (a.D <= 64) return attention_hopper_tiles<T, 64>(a, stream);
  if (a.D <= 128) return attention_hopper_tiles<T, 128>(a, stream);
  if (a.D <= 256) return attention_hopper_tiles<T, 256>(a, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace pyllm
