// RMSNorm of every head of q and of k, and its rotation (turn.cuh), in one launch:
//
//   rstd = 1 / sqrt(mean(x^2) + eps)      n = x * rstd * (offset + w)      y = rotate(n), elements from R on are n
//
// Backward, g = dy turned the other way, x^ = x * rstd, w' = offset + w:
//
//   dx = rstd * (g w' - x^ * mean(g w' x^))      dw = sum over tokens and heads of g x^
//
// A block has one token forward, and every gridDim.x-th one backward; thread (x, y) has every blockDim.x-th unit of
// every blockDim.y-th head, so that a head lies in one warp. Where heads are turned whole and read as vectors, one unit is
// all that a thread has: it keeps it, its angles and weights, and backward its columns of dw, in registers. Elsewhere a
// head is read twice, once for its sum, and from the cache for its result, and dw is added up in shared memory. A row of
// sums for each y, no atomics, one order.
//
// Bytes, the floor: (H + Hkv) * D * sizeof(T) a token, twice forward and three times backward, and R/2 of each table.
#include "rope/qk_norm_rope_cuda.h"

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "rope/turn.cuh"

namespace pyllm {
namespace {

struct Token {
  int64_t number, b, t;
  const float* cos;
  const float* sin;

  __device__ __forceinline__ Token(const QkNormRope& a, int64_t token) : number(token), b(token / a.T), t(token % a.T) {
    int64_t row = a.positions ? a.positions[token] : t;
    row = row < 0 ? 0 : row < a.table_rows ? row : a.table_rows - 1;  // outside: a bug of the caller; memory is ours
    cos = a.cos + b * a.cos_stride[0] + row * a.cos_stride[1];
    sin = a.sin + b * a.sin_stride[0] + row * a.sin_stride[1];
  }
  template <class T>
  __device__ __forceinline__ const T* of(const void* x, const int64_t (&stride)[3]) const {
    return static_cast<const T*>(x) + b * stride[0] + t * stride[1];
  }
};

// V elements from column `col`: of a head in float, and of weights.
template <class T, int V>
__device__ __forceinline__ void read(float (&to)[V], const T* x, int col) {
  const auto packed = Vec<T, V>::load(x + col);
#pragma unroll
  for (int j = 0; j < V; j++) to[j] = packed[j];
}
template <int V>
__device__ __forceinline__ void read_weights(float (&to)[V], const float* w, int col, float offset) {
#pragma unroll
  for (int j = 0; j < V; j++) to[j] = offset + w[col + j];
}

// The unit that a thread has of every head, where heads are turned whole: places of its two vectors, angles, weights.
template <int V, bool kInterleaved>
struct WholeUnit {
  int one, two;
  bool there;  // a warp may have more threads than a head has units
  Angles<V> angles;
  float of_one[V], of_two[V];

  __device__ __forceinline__ WholeUnit(const QkNormRope& a, const Token& token, bool vectors, float sign) {
    const int unit = threadIdx.x, half = int(a.D) / 2;
    there = unit < half / V;
    one = first_of<V, kInterleaved>(unit), two = second_of<V, kInterleaved>(unit, half);
    if (there) angles.load(token.cos + unit * V, token.sin + unit * V, vectors, sign);
  }
  __device__ __forceinline__ void weigh(const float* w, bool vectors, float offset) {
    if (!there) return;
    constexpr int N = V < 4 ? V : 4;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < V; i += N) {
        const auto u = Vec<float, N>::load(w + one + i), v = Vec<float, N>::load(w + two + i);
#pragma unroll
        for (int j = 0; j < N; j++) of_one[i + j] = offset + u[j], of_two[i + j] = offset + v[j];
      }
    } else {
      read_weights(of_one, w, one, offset);
      read_weights(of_two, w, two, offset);
    }
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------
// kHeads of them at a time: that many loads are on their way before the first is waited for.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void normalise_whole_heads(const QkNormRope& a, const WholeUnit<V, kInterleaved>& unit,
                                                      const T* x, int64_t stride, T* out, float* rstd_out, int heads) {
  constexpr int kHeads = 2;
  const int D = int(a.D), width = blockDim.x;
  for (int first = 0; first < heads; first += kHeads * blockDim.y) {
    Vec<T, V> u[kHeads], v[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      const int head = first + h * blockDim.y + threadIdx.y;
      const bool live = head < heads && unit.there;
      u[h] = Vec<T, V>::load_if(live, x + head * stride + unit.one);
      v[h] = Vec<T, V>::load_if(live, x + head * stride + unit.two);
    }
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
      const int head = first + h * blockDim.y + threadIdx.y;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < V; j++) sum += u[h][j] * u[h][j] + v[h][j] * v[h][j];
      const float rstd = 1.f / sqrtf(warp_sum(sum, width) / D + a.eps);
      if (head >= heads) continue;
      if (threadIdx.x == 0) rstd_out[head] = rstd;
      if (!unit.there) continue;
      float of_u[V], of_v[V];
#pragma unroll
      for (int j = 0; j < V; j++) {
        of_u[j] = u[h][j] * rstd * unit.of_one[j];
        of_v[j] = v[h][j] * rstd * unit.of_two[j];
      }
      rotate<V, kInterleaved>(of_u, of_v, unit.angles);
      Vec<T, V>::round(of_u).store(out + int64_t(head) * D + unit.one);
      Vec<T, V>::round(of_v).store(out + int64_t(head) * D + unit.two);
    }
  }
}

template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void normalise_heads(const QkNormRope& a, const Token& token, const T* x, int64_t stride,
                                                const float* w, T* out, float* rstd_out, int heads, bool vectors) {
  const int D = int(a.D), R = int(a.R), half = R / 2, width = blockDim.x;
  for (int first = 0; first < heads; first += blockDim.y) {
    const int head = first + threadIdx.y;
    const bool live = head < heads;  // the others come along to the warp's sum
    const T* from = x + head * stride;
    T* to = out + int64_t(head) * D;
    float sum = 0.f;
    for (int col = threadIdx.x * V; live && col < D; col += width * V) {
      float u[V];
      read<T>(u, from, col);
#pragma unroll
      for (int j = 0; j < V; j++) sum += u[j] * u[j];
    }
    sum = warp_sum(sum, width);
    if (!live) continue;
    const float rstd = 1.f / sqrtf(sum / D + a.eps);
    if (threadIdx.x == 0) rstd_out[head] = rstd;
    auto normalised = [&](float(&u)[V], int col) {
      float weights[V];
      read<T>(u, from, col);
      read_weights(weights, w, col, a.offset);
#pragma unroll
      for (int j = 0; j < V; j++) u[j] = u[j] * rstd * weights[j];
    };
    for (int unit = threadIdx.x; unit < half / V; unit += width) {
      const int one = first_of<V, kInterleaved>(unit), two = second_of<V, kInterleaved>(unit, half);
      Angles<V> angles;
      angles.load(token.cos + unit * V, token.sin + unit * V, vectors, 1.f);
      float u[V], v[V];
      normalised(u, one);
      normalised(v, two);
      rotate<V, kInterleaved>(u, v, angles);
      Vec<T, V>::round(u).store(to + one);
      Vec<T, V>::round(v).store(to + two);
    }
    for (int col = R + threadIdx.x * V; col < D; col += width * V) {
      float u[V];
      normalised(u, col);
      Vec<T, V>::round(u).store(to + col);
    }
  }
}

template <class T, int V, bool kInterleaved>
__global__ void __launch_bounds__(kMostTurnThreads, V > 1 ? 2 : 4)
    qk_norm_rope_fwd_kernel(const __grid_constant__ QkNormRope a, bool vectors) {
  const Token token(a, blockIdx.x);
  const int H = int(a.H), Hkv = int(a.Hkv);
  if constexpr (V > 1) {
    WholeUnit<V, kInterleaved> unit(a, token, vectors, 1.f);
    unit.weigh(a.q_weight, vectors, a.offset);
    normalise_whole_heads<T>(a, unit, token.of<T>(a.q, a.q_stride), a.q_stride[2],
                             static_cast<T*>(a.q_out) + token.number * H * a.D, a.rstd_q + token.number * H, H);
    unit.weigh(a.k_weight, vectors, a.offset);
    normalise_whole_heads<T>(a, unit, token.of<T>(a.k, a.k_stride), a.k_stride[2],
                             static_cast<T*>(a.k_out) + token.number * Hkv * a.D, a.rstd_k + token.number * Hkv, Hkv);
  } else {
    normalise_heads<T, V, kInterleaved>(a, token, token.of<T>(a.q, a.q_stride), a.q_stride[2], a.q_weight,
                                        static_cast<T*>(a.q_out) + token.number * H * a.D, a.rstd_q + token.number * H,
                                        H, vectors);
    normalise_heads<T, V, kInterleaved>(a, token, token.of<T>(a.k, a.k_stride), a.k_stride[2], a.k_weight,
                                        static_cast<T*>(a.k_out) + token.number * Hkv * a.D,
                                        a.rstd_k + token.number * Hkv, Hkv, vectors);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------
// dweight: this y's row of D sums in shared memory.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void differentiate_heads(const QkNormRope& a, const Token& token, const T* dy,
                                                    int64_t dy_stride, const T* x, int64_t stride, const float* w,
                                                    T* dx, const float* rstd_of, float* dweight, int heads,
                                                    bool vectors) {
  const int D = int(a.D), R = int(a.R), half = R / 2, width = blockDim.x;
  for (int first = 0; first < heads; first += blockDim.y) {
    const int head = first + threadIdx.y;
    const bool live = head < heads;
    const T* of_dy = dy + head * dy_stride;
    const T* of_x = x + head * stride;
    T* to = dx + int64_t(head) * D;
    const float rstd = live ? rstd_of[head] : 0.f;
    // body(g, col) for all of this thread's columns: V gradients of what was normalised.
    auto each = [&](const auto& body) {
      for (int unit = threadIdx.x; live && unit < half / V; unit += width) {
        const int one = first_of<V, kInterleaved>(unit), two = second_of<V, kInterleaved>(unit, half);
        Angles<V> angles;
        angles.load(token.cos + unit * V, token.sin + unit * V, vectors, -1.f);
        float u[V], v[V];
        read<T>(u, of_dy, one);
        read<T>(v, of_dy, two);
        rotate<V, kInterleaved>(u, v, angles);
        body(u, one);
        body(v, two);
      }
      for (int col = R + threadIdx.x * V; live && col < D; col += width * V) {
        float u[V];
        read<T>(u, of_dy, col);
        body(u, col);
      }
    };
    float dot = 0.f;
    each([&](const float(&g)[V], int col) {
      float unit[V], weights[V];
      read<T>(unit, of_x, col);
      read_weights(weights, w, col, a.offset);
#pragma unroll
      for (int j = 0; j < V; j++) {
        unit[j] *= rstd;
        dot += g[j] * weights[j] * unit[j];
        dweight[col + j] += g[j] * unit[j];
      }
    });
    const float mean = warp_sum(dot, width) / D;
    each([&](const float(&g)[V], int col) {
      float unit[V], weights[V], out[V];
      read<T>(unit, of_x, col);
      read_weights(weights, w, col, a.offset);
#pragma unroll
      for (int j = 0; j < V; j++) out[j] = rstd * (g[j] * weights[j] - unit[j] * rstd * mean);
      Vec<T, V>::round(out).store(to + col);
    });
  }
}

// dw of a thread's own columns goes to of_one and of_two.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void differentiate_whole_heads(const QkNormRope& a, const WholeUnit<V, kInterleaved>& unit,
                                                          const T* dy, int64_t dy_stride, const T* x, int64_t stride,
                                                          T* dx, const float* rstd_of, float (&of_one)[V],
                                                          float (&of_two)[V], int heads) {
  const int D = int(a.D), width = blockDim.x;
  for (int first = 0; first < heads; first += blockDim.y) {
    const int head = first + threadIdx.y;
    const bool live = head < heads && unit.there;
    const auto dy_u = Vec<T, V>::load_if(live, dy + head * dy_stride + unit.one);
    const auto dy_v = Vec<T, V>::load_if(live, dy + head * dy_stride + unit.two);
    const auto x_u = Vec<T, V>::load_if(live, x + head * stride + unit.one);
    const auto x_v = Vec<T, V>::load_if(live, x + head * stride + unit.two);
    const float rstd = live ? rstd_of[head] : 0.f;
    float g_u[V], g_v[V], dot = 0.f;
#pragma unroll
    for (int j = 0; j < V; j++) g_u[j] = dy_u[j], g_v[j] = dy_v[j];
    if (live) {  // or there are no angles
      rotate<V, kInterleaved>(g_u, g_v, unit.angles);
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float u = x_u[j] * rstd, v = x_v[j] * rstd;
        of_one[j] += g_u[j] * u, of_two[j] += g_v[j] * v;
        g_u[j] *= unit.of_one[j], g_v[j] *= unit.of_two[j];
        dot += g_u[j] * u + g_v[j] * v;
      }
    }
    const float mean = warp_sum(dot, width) / D;
    if (!live) continue;
#pragma unroll
    for (int j = 0; j < V; j++) {
      g_u[j] = rstd * (g_u[j] - x_u[j] * rstd * mean);
      g_v[j] = rstd * (g_v[j] - x_v[j] * rstd * mean);
    }
    Vec<T, V>::round(g_u).store(dx + int64_t(head) * D + unit.one);
    Vec<T, V>::round(g_v).store(dx + int64_t(head) * D + unit.two);
  }
}

// All tokens of the block; dw of y's heads to its row of sums.
template <class T, int V, bool kInterleaved>
__device__ __forceinline__ void differentiate_whole_tokens(const QkNormRopeBackward& b, float* sums, bool vectors) {
  const QkNormRope& a = b.forward;
  const int D = int(a.D), H = int(a.H), Hkv = int(a.Hkv), half = D / 2, mine = threadIdx.x;
  float q_one[V] = {}, q_two[V] = {}, k_one[V] = {}, k_two[V] = {};
  for (int64_t n = blockIdx.x; n < a.B * a.T; n += gridDim.x) {
    const Token token(a, n);
    WholeUnit<V, kInterleaved> unit(a, token, vectors, -1.f);
    unit.weigh(a.q_weight, vectors, a.offset);
    differentiate_whole_heads<T>(a, unit, token.of<T>(b.dq, b.dq_stride), b.dq_stride[2], token.of<T>(a.q, a.q_stride),
                                 a.q_stride[2], static_cast<T*>(a.q_out) + n * H * D, a.rstd_q + n * H, q_one, q_two, H);
    unit.weigh(a.k_weight, vectors, a.offset);
    differentiate_whole_heads<T>(a, unit, token.of<T>(b.dk, b.dk_stride), b.dk_stride[2], token.of<T>(a.k, a.k_stride),
                                 a.k_stride[2], static_cast<T*>(a.k_out) + n * Hkv * D, a.rstd_k + n * Hkv, k_one, k_two,
                                 Hkv);
  }
  if (mine >= half / V) return;
  const int one = first_of<V, kInterleaved>(mine), two = second_of<V, kInterleaved>(mine, half);
#pragma unroll
  for (int j = 0; j < V; j++) {
    sums[one + j] = q_one[j], sums[two + j] = q_two[j];
    sums[D + one + j] = k_one[j], sums[D + two + j] = k_two[j];
  }
}

template <class T, int V, bool kInterleaved>
__global__ void __launch_bounds__(kMostTurnThreads)
    qk_norm_rope_bwd_kernel(const __grid_constant__ QkNormRopeBackward b, bool vectors) {
  SHARED_DYNAMIC(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // (blockDim.y, 2, D)
  const QkNormRope& a = b.forward;
  const int D = int(a.D), H = int(a.H), Hkv = int(a.Hkv);
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, threads = blockDim.x * blockDim.y;
  float* const mine = sums + threadIdx.y * 2 * D;
  if constexpr (V > 1) {
    differentiate_whole_tokens<T, V, kInterleaved>(b, mine, vectors);
  } else {
    for (int i = thread; i < int(blockDim.y) * 2 * D; i += threads) sums[i] = 0.f;
    __syncthreads();
    for (int64_t n = blockIdx.x; n < a.B * a.T; n += gridDim.x) {
      const Token token(a, n);
      differentiate_heads<T, V, kInterleaved>(a, token, token.of<T>(b.dq, b.dq_stride), b.dq_stride[2],
                                              token.of<T>(a.q, a.q_stride), a.q_stride[2], a.q_weight,
                                              static_cast<T*>(a.q_out) + n * H * D, a.rstd_q + n * H, mine, H, vectors);
      differentiate_heads<T, V, kInterleaved>(a, token, token.of<T>(b.dk, b.dk_stride), b.dk_stride[2],
                                              token.of<T>(a.k, a.k_stride), a.k_stride[2], a.k_weight,
                                              static_cast<T*>(a.k_out) + n * Hkv * D, a.rstd_k + n * Hkv, mine + D, Hkv,
                                              vectors);
    }
  }
  __syncthreads();
  for (int i = thread; i < 2 * D; i += threads) {
    float sum = 0.f;
    for (int y = 0; y < int(blockDim.y); y++) sum += sums[y * 2 * D + i];
    b.partial[int64_t(blockIdx.x) * 2 * D + i] = sum;
  }
}

// ---- host side -----------------------------------------------------------------------------------------------------
constexpr int kMostSums = 48 << 10;  // bytes of shared memory for dw

// A head in one warp: whole warps of one head each, or several heads side by side.
TurnBlock block_for(const QkNormRope& a, int64_t V) {
  TurnBlock block(a.D, a.R, V, a.H > a.Hkv ? a.H : a.Hkv, kWarp);
  while (block.width * block.groups < kWarp) block.groups *= 2;  // sums are of whole warps
  return block;
}

template <class T, int V, bool kInterleaved>
int forward(const QkNormRope& a, bool vectors, void* stream) {
  const int64_t tokens = a.B * a.T;
  if (tokens > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const TurnBlock block = block_for(a, V);
  return launch(qk_norm_rope_fwd_kernel<T, V, kInterleaved>, dim3(unsigned(tokens)), dim3(block.width, block.groups),
                stream, a, vectors);
}

template <class T, int V, bool kInterleaved>
int backward(const QkNormRopeBackward& b, bool vectors, void* stream) {
  const QkNormRope& a = b.forward;
  TurnBlock block = block_for(a, V);
  while (block.width * block.groups > kWarp && block.groups * 8 * a.D > kMostSums) block.groups /= 2;
  return launch_shared(qk_norm_rope_bwd_kernel<T, V, kInterleaved>, dim3(unsigned(b.parts)),
                       dim3(block.width, block.groups), int(block.groups * 8 * a.D), stream, b, vectors);
}

// body(vector length, interleaved?, may tables and weights be read as vectors?): of length 1 unless heads are turned whole.
template <class T, class Body>
int by_alignment(const QkNormRope& a, bool more, const Body& body) {
  constexpr int V = vector_length<T>();
  const bool whole = a.R == a.D && a.D / 2 % V == 0 && a.D / 2 / V <= kWarp;
  const bool fit = more && whole && heads_fit<T, V>(a.q, a.q_stride) &&
                   heads_fit<T, V>(a.k, a.k_stride) && vectors_fit<T, V>(static_cast<T*>(a.q_out), 0) &&
                   vectors_fit<T, V>(static_cast<T*>(a.k_out), 0);
  const bool vectors = tables_fit(a.cos, a.cos_stride) && tables_fit(a.sin, a.sin_stride) &&
                       vectors_fit<float, 4>(a.q_weight, 0) && vectors_fit<float, 4>(a.k_weight, 0);
  using Many = std::integral_constant<int, V>;
  using One = std::integral_constant<int, 1>;
  if (fit && a.interleaved) return body(Many(), std::true_type(), vectors);
  if (fit) return body(Many(), std::false_type(), vectors);
  if (a.interleaved) return body(One(), std::true_type(), false);
  return body(One(), std::false_type(), false);
}

}  // namespace

int qk_norm_rope_fwd(const QkNormRope& a, void* stream) {
  if (a.B == 0 || a.T == 0 || a.D == 0 || (a.H == 0 && a.Hkv == 0)) return 0;
  return dispatch(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return by_alignment<T>(a, true, [&](auto V, auto interleaved, bool vectors) {
      return forward<T, decltype(V)::value, decltype(interleaved)::value>(a, vectors, stream);
    });
  });
}

int qk_norm_rope_bwd(const QkNormRopeBackward& b, void* stream) {
  const QkNormRope& a = b.forward;
  if (a.D == 0 || b.parts == 0) return 0;
  return dispatch(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = vector_length<T>();
    const bool more = heads_fit<T, V>(b.dq, b.dq_stride) && heads_fit<T, V>(b.dk, b.dk_stride);
    return by_alignment<T>(a, more, [&](auto length, auto interleaved, bool vectors) {
      return backward<T, decltype(length)::value, decltype(interleaved)::value>(b, vectors, stream);
    });
  });
}

}  // namespace pyllm
