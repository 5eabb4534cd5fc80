// Attention backward by tiles, deterministic and without atomics: two roles of one kernel.
//
//   of keys      a block owns keys and walks over the queries of its group's heads:  dV += P^T dO,  dK += dS^T Q
//   of queries   a block owns queries and walks over their keys:                     dQ += dS K
//
// with P = exp(s - lse) and dS = P * (dO V^T - delta), computed anew from q, k, dout and v in both. Owned rows are the rows
// of the products S and dO V^T, so that these need no transposing: they stay in registers and are the next product's
// left operand. That takes 7 products where one walk with atomic additions of dQ takes 5, and every gradient has a
// fixed order of summation.
//
// delta = sum(out * dout) - dlse of every query comes first, from a kernel of its own.
//
// Floor: 10 D operations a visible pair of query and key, by the usual count; 14 D are done.
#pragma once
#include "attention/softmax.cuh"
#include "attention/warp_tiles.cuh"
#include "common/launch.cuh"

namespace pyllm {

enum class Gradient { kKeysAndValues, kKeys, kValues, kQueries };

// Shared memory: two tiles of what a block owns; in each stage two tiles of the others, and their lse and delta. With two
// stages one is fetched while the other is worked on. Accumulators of dK and dV fill the registers where C is 256:
// they then take a walk each.
template <class T, int C>
struct BackwardTiles {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kWarps = !kHalf && C == 256 ? 2 : 4;
  static constexpr int kOther = kHalf && C <= 128 ? 64 : !kHalf && C == 256 ? 16 : 32;
  static constexpr int kStages = C * int(sizeof(T)) >= 512 ? 1 : 2;
  static constexpr bool kTogether = C < 256;
  static constexpr int kThreads = kWarps * kWarp, kRows = 16 * kWarps;
  static constexpr int kShared = Tile<T, C>::bytes(2 * kRows + 2 * kStages * kOther) + 2 * 4 * kStages * kOther;
};

template <class T, int C, Gradient what>
__global__ void __launch_bounds__(BackwardTiles<T, C>::kThreads, 2)
    attention_bwd_kernel(const __grid_constant__ AttentionBackward b, bool vectors, bool out_vectors) {
  using Shape = BackwardTiles<T, C>;
  constexpr bool kOfKeys = what != Gradient::kQueries, kOfValues = what == Gradient::kValues;
  constexpr bool kDv = kOfValues || what == Gradient::kKeysAndValues;
  constexpr int kOther = Shape::kOther, N = kOther / 8, kStages = Shape::kStages, kThreads = Shape::kThreads;
  const Attention& a = b.forward;
  SHARED_DYNAMIC(shared);
  constexpr int kOwnBytes = Tile<T, C>::bytes(Shape::kRows), kOtherBytes = Tile<T, C>::bytes(kOther);
  // Own k and v and the others' q and dout; or own q and dout and the others' k and v.
  const Tile<T, C> own{shared}, own_dual{shared + kOwnBytes};
  auto other = [&](int stage) { return Tile<T, C>{shared + 2 * kOwnBytes + 2 * stage * kOtherBytes}; };
  auto other_dual = [&](int stage) { return Tile<T, C>{shared + 2 * kOwnBytes + (2 * stage + 1) * kOtherBytes}; };
  float* const lse_of = reinterpret_cast<float*>(shared + 2 * kOwnBytes + 2 * kStages * kOtherBytes);
  float* const delta_of = lse_of + kStages * kOther;

  const Place at = find_place<Shape::kRows, kOfKeys>(a, int(kOfKeys ? a.Hkv : a.H));
  const Span& span = at.span;
  const int D = int(a.D), thread = threadIdx.x, group = int(a.H / a.Hkv);
  const int rows = min(Shape::kRows, (kOfKeys ? span.S : span.T) - at.row);
  if (rows <= 0) return;

  auto q_rows = [&](int head, int i) {
    return RowsOf<T>{head_of(static_cast<const T*>(a.q), a.q_stride, at, at.q_row0 + i, head), a.q_stride.row,
                     span.T - i};
  };
  auto dout_rows = [&](int head, int i) {
    return RowsOf<T>{head_of(static_cast<const T*>(b.dout), b.dout_stride, at, at.q_row0 + i, head), b.dout_stride.row,
                     span.T - i};
  };
  auto k_rows = [&](int head, int j) {
    return RowsOf<T>{head_of(static_cast<const T*>(a.k), a.k_stride, at, at.k_row0 + j, head), a.k_stride.row,
                     span.S - j};
  };
  auto v_rows = [&](int head, int j) {
    return RowsOf<T>{head_of(static_cast<const T*>(a.v), a.v_stride, at, at.k_row0 + j, head), a.v_stride.row,
                     span.S - j};
  };
  // The lse of a query that counts, in base 2; infinity makes all probabilities 0.
  auto lse_at = [&](int head, int i) {
    const float lse = i < span.T ? a.lse[lse_offset(a, at, head) + i] : -kInfinity;
    return lse == -kInfinity ? kInfinity : lse * kLog2e;
  };
  auto delta_at = [&](int head, int i) { return i < span.T ? b.delta[lse_offset(a, at, head) + i] : 0.f; };

  const int last = at.row + rows - 1;
  const int begin = (kOfKeys ? span.first_query(at.row) : span.first_key(at.row)) / kOther * kOther;
  const int end = kOfKeys ? span.end_query(last) : span.end_key(last);
  const int tiles = max(0, int(ceil_div(end - begin, kOther))), walk = tiles * (kOfKeys ? group : 1);
  auto head_at = [&](int n) { return kOfKeys ? at.head * group + n / tiles : at.head / group; };
  auto fetch = [&](int n) {
    if (n < walk) {
      const int stage = n % kStages, head = head_at(n), first = begin + n % tiles * kOther;
      if (kOfKeys) {
        fetch_tile<kOther, kThreads>(other(stage), q_rows(head, first), D, vectors, thread);
        fetch_tile<kOther, kThreads>(other_dual(stage), dout_rows(head, first), D, vectors, thread);
        if (thread < kOther) {
          lse_of[stage * kOther + thread] = lse_at(head, first + thread);
          delta_of[stage * kOther + thread] = delta_at(head, first + thread);
        }
      } else {
        fetch_tile<kOther, kThreads>(other(stage), k_rows(head, first), D, vectors, thread);
        fetch_tile<kOther, kThreads>(other_dual(stage), v_rows(head, first), D, vectors, thread);
      }
    }
    cp_async_commit();  // one group a stage, be it empty: the wait counts them
  };
  if (kOfKeys) {
    fetch_tile<Shape::kRows, kThreads>(own, k_rows(at.head, at.row), D, vectors, thread);
    fetch_tile<Shape::kRows, kThreads>(own_dual, v_rows(at.head, at.row), D, vectors, thread);
  } else {
    fetch_tile<Shape::kRows, kThreads>(own, q_rows(at.head, at.row), D, vectors, thread);
    fetch_tile<Shape::kRows, kThreads>(own_dual, dout_rows(at.head, at.row), D, vectors, thread);
  }
  cp_async_commit();
#pragma unroll
  for (int n = 0; n < kStages - 1; n++) fetch(n);

  const int row = thread / kWarp * 16, g = thread % kWarp / 4, t = thread % 4;
  const Score score(a.scale, a.softcap);
  float own_lse[2], own_delta[2];
  if (!kOfKeys)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      own_lse[i] = lse_at(at.head, at.row + row + g + 8 * i);
      own_delta[i] = delta_at(at.head, at.row + row + g + 8 * i);
    }
  float acc[1][C / 8][4] = {}, acc_dv[1][kDv ? C / 8 : 1][4] = {};  // acc: of dK or dQ
  for (int n = 0; n < walk; n++) {
    fetch(n + kStages - 1);
    cp_async_wait<kStages - 1>();
    __syncthreads();
    const int stage = n % kStages, first = begin + n % tiles * kOther;
    float s[1][N][4] = {}, ds[1][N][4] = {};
    multiply_rows(s, own, row, other(stage));
    if (!kOfValues) multiply_rows(ds, own_dual, row, other_dual(stage));
    score.of(s);
    const bool all = kOfKeys ? span.all_see(first, min(first + kOther, span.T) - 1, at.row, last)
                             : span.all_see(at.row, last, first, first + kOther - 1);
    if (!all) hide_unseen<kOfKeys>(s, span, at.row + row, first);
    auto to_gradients = [&](auto capped) {  // s becomes P, ds dS
#pragma unroll
      for (int c = 0; c < N; c++) {
        [[maybe_unused]] const int column = stage * kOther + 8 * c + 2 * t;  // this one and the next
        float2 lse, delta;
        if constexpr (kOfKeys) {
          lse = *reinterpret_cast<const float2*>(lse_of + column);
          delta = *reinterpret_cast<const float2*>(delta_of + column);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
          if constexpr (!kOfKeys) lse.x = lse.y = own_lse[e / 2], delta.x = delta.y = own_delta[e / 2];
          const float x = s[0][c][e];
          s[0][c][e] = exp2_fast(fmaf(x, score.unit, e % 2 ? -lse.y : -lse.x));
          ds[0][c][e] = s[0][c][e] * (ds[0][c][e] - (e % 2 ? delta.y : delta.x));
          if constexpr (decltype(capped)::value) ds[0][c][e] *= x == -kInfinity ? 0.f : score.derivative(x);
        }
      }
    };
    if (score.cap > 0.f) to_gradients(std::true_type());
    else to_gradients(std::false_type());
    if constexpr (kDv) multiply_columns(acc_dv, s, other_dual(stage));
    if constexpr (!kOfValues) multiply_columns(acc, ds, other(stage));
    __syncthreads();  // the stage may be filled again
  }
  cp_async_wait<0>();  // what was fetched for nobody
  __syncthreads();

  const float plain[1][2] = {{1.f, 1.f}}, scaled[1][2] = {{a.scale, a.scale}};
  const int heads = int(kOfKeys ? a.Hkv : a.H), row0 = kOfKeys ? at.k_row0 : at.q_row0;
  const AttentionStride dense = {(kOfKeys ? a.S : a.T) * heads * D, int64_t(heads) * D, D};
  auto store = [&](const float (&sums)[1][C / 8][4], const float (&factor)[1][2], const Tile<T, C>& tile, void* to) {
    T* first = head_of(static_cast<T*>(to), dense, at, row0 + at.row + row, at.head);
    store_rows<1>(sums, factor, tile, row, first, dense.row, rows - row, D, out_vectors);
  };
  if constexpr (!kOfValues) store(acc, scaled, own, kOfKeys ? b.dk : b.dq);
  if constexpr (kDv) store(acc_dv, plain, own_dual, b.dv);
}

// delta, a warp for every query of every head.
template <class T>
__global__ void __launch_bounds__(128)
    attention_delta_kernel(const __grid_constant__ AttentionBackward b, int64_t rows, bool vectors) {
  constexpr int V = kVectorBytes / sizeof(T);
  const Attention& a = b.forward;
  const int64_t row = blockIdx.x * int64_t(4) + threadIdx.x / kWarp;  // of (B, H, T)
  if (row >= rows) return;
  const int64_t i = row % a.T, head = row / a.T % a.H, batch = row / a.T / a.H;
  auto at = [&](const void* first, const AttentionStride& stride) {
    return static_cast<const T*>(first) + batch * stride.batch + i * stride.row + head * stride.head;
  };
  const T* out = at(a.out, b.out_stride);
  const T* dout = at(b.dout, b.dout_stride);
  const int lane = threadIdx.x % kWarp, D = int(a.D);
  float sum = 0.f;
  if (vectors) {
    for (int c = lane * V; c < D; c += kWarp * V) {
      const auto x = Vec<T, V>::load(out + c), y = Vec<T, V>::load(dout + c);
#pragma unroll
      for (int j = 0; j < V; j++) sum += x[j] * y[j];
    }
  } else {
    for (int c = lane; c < D; c += kWarp) sum += Vec<T, 1>::load(out + c)[0] * Vec<T, 1>::load(dout + c)[0];
  }
  sum = warp_sum(sum);
  if (lane == 0) b.delta[row] = b.dlse ? sum - b.dlse[row] : sum;
}

// ---- host side -----------------------------------------------------------------------------------------------------
template <class T, int C, Gradient what>
int attention_bwd_walk(const AttentionBackward& b, bool vectors, bool out_vectors, void* stream) {
  using Shape = BackwardTiles<T, C>;
  constexpr bool kOfKeys = what != Gradient::kQueries;
  const Attention& a = b.forward;
  const int64_t blocks = blocks_for(a, Shape::kRows, kOfKeys ? a.Hkv : a.H, kOfKeys);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  if (blocks == 0 || (kOfKeys ? a.S : a.T) == 0) return 0;
  return launch_shared(attention_bwd_kernel<T, C, what>, dim3(unsigned(blocks)), dim3(Shape::kThreads), Shape::kShared,
                       stream, b, vectors, out_vectors);
}

template <class T, int C>
int attention_bwd_tiles(const AttentionBackward& b, void* stream) {
  const Attention& a = b.forward;
  const bool vectors = heads_are_vectors<T>(a.q, a.q_stride, a.D) && heads_are_vectors<T>(a.k, a.k_stride, a.D) &&
                       heads_are_vectors<T>(a.v, a.v_stride, a.D) && heads_are_vectors<T>(b.dout, b.dout_stride, a.D);
  const bool out_vectors = heads_are_vectors<T>(b.dq, {}, a.D) && heads_are_vectors<T>(b.dk, {}, a.D) &&
                           heads_are_vectors<T>(b.dv, {}, a.D);
  auto walk = [&](auto what) { return attention_bwd_walk<T, C, decltype(what)::value>(b, vectors, out_vectors, stream); };
  int error = walk(std::integral_constant<Gradient, Gradient::kQueries>());
  if constexpr (BackwardTiles<T, C>::kTogether) {
    if (error == 0) error = walk(std::integral_constant<Gradient, Gradient::kKeysAndValues>());
  } else {
    if (error == 0) error = walk(std::integral_constant<Gradient, Gradient::kKeys>());
    if (error == 0) error = walk(std::integral_constant<Gradient, Gradient::kValues>());
  }
  return error;
}

template <class T>
int attention_bwd_tiled(const AttentionBackward& b, void* stream) {
  const Attention& a = b.forward;
  const int64_t rows = (a.cu_q ? 1 : a.B) * a.H * a.T, blocks = ceil_div(rows, 4);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const bool vectors =
      heads_are_vectors<T>(a.out, b.out_stride, a.D) && heads_are_vectors<T>(b.dout, b.dout_stride, a.D);
  if (rows > 0)
    if (int error = launch(attention_delta_kernel<T>, dim3(unsigned(blocks)), dim3(128), stream, b, rows, vectors))
      return error;
  return by_head_dim<T>(a.D, [&](auto C) { return attention_bwd_tiles<T, decltype(C)::value>(b, stream); });
}

}  // namespace pyllm
