// Cross-entropy of logits, forward and backward. For a row x with target y, weights w (1 without), x capped first:
//
//   lse  = log(sum_c exp(x_c))
//   loss = (1 - eps) w_y (lse - x_y) + eps / V sum_c w_c (lse - x_c) + z lse^2
//   dx_c = dloss * (share p_c - (1 - eps) w_y [c = y] - eps / V w_c) (* (1 - (x_c / cap)^2)),   p = exp(x - lse),
//          share = (1 - eps) w_y + eps / V sum w + 2 z lse
//
// and nothing where y is ignore_index: such rows are not even read. Forward reads a row once. Every thread keeps a
// running maximum `top` of what it saw and the sum of exp(x - top); these sums are merged at the end, always in the same
// order. The loss is taken from top - x_y, not from lse - x_y, which would cancel where logits lie far from zero. With few
// rows a row has several blocks, whose sums a second kernel merges. Backward needs lse alone: no maximum, no sum.
//
// Rows begin anywhere (odd vocabularies): see common/row.cuh.
//
// Bytes, the floor: forward sizeof(T) a logit, backward 2 * sizeof(T).
#include "cross_entropy/cross_entropy_cuda.h"

#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/row.cuh"

namespace pyllm {
namespace {

constexpr int kForwardThreads = 512, kBackwardThreads = 256;
constexpr int kForwardVectors = 4, kBackwardVectors = 2;  // of 16 bytes that a thread has in flight

// A finite number to subtract where every logit so far is -inf.
__device__ __forceinline__ float anchor(float top) { return top == -INFINITY ? 0.f : top; }

// What a pass over some logits found.
struct Sums {
  float top = -INFINITY;  // the largest
  float total = 0.f;      // sum of exp(x - top)
  float spread = 0.f;     // sum of w (top - x)
  float shares = 0.f;     // sum of w

  __device__ __forceinline__ void raise(float to) {
    if (to == top) return;
    total *= exp_fast(top - anchor(to));
    spread += shares * (anchor(to) - anchor(top));
    top = to;
  }
  __device__ __forceinline__ void merge(Sums other) {
    const float to = fmaxf(top, other.top);
    raise(to);
    other.raise(to);
    total += other.total;
    spread += other.spread;
    shares += other.shares;
  }
};

__device__ __forceinline__ Sums shuffled(const Sums& s, int lanes) {
  Sums other;
  other.top = __shfl_xor_sync(kAllLanes, s.top, lanes);
  other.total = __shfl_xor_sync(kAllLanes, s.total, lanes);
  other.spread = __shfl_xor_sync(kAllLanes, s.spread, lanes);
  other.shares = __shfl_xor_sync(kAllLanes, s.shares, lanes);
  return other;
}

// Over the lanes of a warp; all get the result. Merging is not exactly symmetric, so the lower lane's always comes first.
__device__ __forceinline__ Sums warp_merge(Sums s) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    Sums other = shuffled(s, lanes);
    if (threadIdx.x & lanes) {
      other.merge(s);
      s = other;
    } else {
      s.merge(other);
    }
  }
  return s;
}

// Over a block of whole warps; the first warp's lanes get the result.
__device__ __forceinline__ Sums block_merge(Sums s) {
  __shared__ float of_warp[4][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  s = warp_merge(s);
  if (lane == 0) {
    of_warp[0][warp] = s.top;
    of_warp[1][warp] = s.total;
    of_warp[2][warp] = s.spread;
    of_warp[3][warp] = s.shares;
  }
  __syncthreads();
  if (warp > 0) return s;
  Sums other;
  if (lane < int(blockDim.x) / kWarp) {
    other.top = of_warp[0][lane];
    other.total = of_warp[1][lane];
    other.spread = of_warp[2][lane];
    other.shares = of_warp[3][lane];
  }
  return warp_merge(other);
}

// One row's options, the same for all of its threads. kPlain: no weights, smoothing, cap.
struct Options {
  const float* weight;
  const float* weight_sum;
  int64_t ignore_index;
  float smoothing, z_loss, softcap;

  __device__ __forceinline__ float capped(float x) const { return softcap > 0.f ? softcap * tanhf(x / softcap) : x; }
  __device__ __forceinline__ float weight_of(int c) const { return weight ? weight[c] : 1.f; }
  __device__ __forceinline__ float all_weights(int classes) const { return weight ? *weight_sum : float(classes); }
};

// N more logits, of classes `first` and on.
template <bool kPlain, int N>
__device__ __forceinline__ void add(Sums& sums, float (&x)[N], int first, const Options& options) {
  float most = -INFINITY;
#pragma unroll
  for (int j = 0; j < N; j++) {
    if (!kPlain) x[j] = options.capped(x[j]);
    most = max_nan(most, x[j]);  // a NaN stays, and with it the row's loss is NaN
  }
  sums.raise(max_nan(most, sums.top));
  const float base = anchor(sums.top);
#pragma unroll
  for (int j = 0; j < N; j++) {
    sums.total += exp_fast(x[j] - base);  // beside memory at full speed there is no time for expf's care
    if (!kPlain && options.smoothing > 0.f) {
      const float w = options.weight_of(first + j);
      sums.spread += w * (base - x[j]);
      sums.shares += w;
    }
  }
}

// loss and lse of a row from all of its sums; x_y is its target's logit, capped.
template <bool kPlain>
__device__ __forceinline__ void finish(const Sums& sums, float target_logit, int64_t y, int classes,
                                       const Options& options, float* loss, float* lse) {
  if (y == options.ignore_index) {
    *loss = 0.f;
    *lse = 0.f;
    return;
  }
  const float log_total = sums.total == 0.f ? NAN : logf(sums.total);  // 0: a row of nothing but -inf
  const float top = anchor(sums.top), whole = top + log_total;
  float of_row = (top - target_logit) + log_total;
  const bool inside = y >= 0 && y < classes;
  if (!kPlain) {
    if (inside) of_row *= options.weight_of(int(y));
    if (options.smoothing > 0.f) {
      const float all = sums.spread + options.all_weights(classes) * log_total;
      of_row = (1.f - options.smoothing) * of_row + options.smoothing / classes * all;
    }
  }
  if (options.z_loss != 0.f) of_row += options.z_loss * whole * whole;
  *loss = inside ? of_row : NAN;  // a target out of range, about which nobody can be told from here
  *lse = whole;
}

// Grid: `parts` blocks per row. With one part they write loss and lse, else their sums to `partial` (rows, parts, 4).
template <class T, bool kPlain>
__global__ void __launch_bounds__(kForwardThreads) cross_entropy_fwd_kernel(
    const T* __restrict__ logits, const int64_t* __restrict__ target, float* __restrict__ loss, float* __restrict__ lse,
    float* __restrict__ partial, int classes, int64_t stride, int parts, Options options) {
  constexpr int V = vector_length<T>(), K = kForwardVectors;
  const int64_t row = blockIdx.x / parts;
  const int part = blockIdx.x % parts, t = threadIdx.x, width = blockDim.x;
  const int64_t y = target[row];
  const T* x = logits + row * stride;
  const Row<T> in(x, classes, x);
  Sums sums;
  if (y != options.ignore_index) {
    const T* vectors = x + in.lead;
    const int step = parts * width;
    for (int i = part * width + t; i < in.singles; i += step) {
      float one[1] = {element(x + in.single(i))};
      add<kPlain>(sums, one, in.single(i), options);
    }
    int i = part * width + t;
    for (; i + (K - 1) * step < in.vectors; i += K * step) {
      Vec<T, V> loaded[K];
#pragma unroll
      for (int k = 0; k < K; k++) loaded[k] = Vec<T, V>::load(vectors + int64_t(i + k * step) * V);
#pragma unroll
      for (int k = 0; k < K; k++) {
        float some[V];
#pragma unroll
        for (int j = 0; j < V; j++) some[j] = loaded[k][j];
        add<kPlain>(sums, some, in.lead + (i + k * step) * V, options);
      }
    }
    for (; i < in.vectors; i += step) {
      const auto loaded = Vec<T, V>::load(vectors + int64_t(i) * V);
      float some[V];
#pragma unroll
      for (int j = 0; j < V; j++) some[j] = loaded[j];
      add<kPlain>(sums, some, in.lead + i * V, options);
    }
  }
  sums = block_merge(sums);
  if (t > 0) return;
  if (parts > 1) {
    float* mine = partial + (row * parts + part) * 4;
    mine[0] = sums.top;
    mine[1] = sums.total;
    mine[2] = sums.spread;
    mine[3] = sums.shares;
    return;
  }
  const bool inside = y >= 0 && y < classes && y != options.ignore_index;
  finish<kPlain>(sums, inside ? options.capped(element(x + y)) : 0.f, y, classes, options, loss + row, lse + row);
}

// Grid: a warp per row.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kWarp) cross_entropy_merge_kernel(
    const T* __restrict__ logits, const int64_t* __restrict__ target, const float* __restrict__ partial,
    float* __restrict__ loss, float* __restrict__ lse, int classes, int64_t stride, int parts, Options options) {
  const int64_t row = blockIdx.x;
  Sums sums;
  for (int part = threadIdx.x; part < parts; part += kWarp) {
    const float* theirs = partial + (row * parts + part) * 4;
    Sums other;
    other.top = theirs[0];
    other.total = theirs[1];
    other.spread = theirs[2];
    other.shares = theirs[3];
    sums.merge(other);
  }
  sums = warp_merge(sums);
  if (threadIdx.x > 0) return;
  const int64_t y = target[row];
  const bool inside = y >= 0 && y < classes && y != options.ignore_index;
  const float logit = inside ? options.capped(element(logits + row * stride + y)) : 0.f;
  finish<kPlain>(sums, logit, y, classes, options, loss + row, lse + row);
}

// The gradient of one row, as far as it is the same for all classes.
struct RowGradient {
  float lse, share, at_target, everywhere;
  int64_t y;

  template <bool kPlain>
  __device__ __forceinline__ float of(float x, int c, const Options& options) const {
    if (!kPlain) x = options.capped(x);
    float dx = expf(x - lse) * share;
    if (!kPlain && options.smoothing > 0.f) dx -= everywhere * options.weight_of(c);
    if (c == y) dx -= at_target;
    if (!kPlain && options.softcap > 0.f) dx *= 1.f - (x / options.softcap) * (x / options.softcap);
    return dx;
  }
};

// Grid: `tiles` blocks per row, each kBackwardVectors * blockDim.x vectors wide; single elements go round. The rows are
// of `columns` classes, from `first` on, of all.
template <class T, class Out, bool kPlain>
__global__ void __launch_bounds__(kBackwardThreads) cross_entropy_bwd_kernel(
    const float* __restrict__ dloss, const T* __restrict__ logits, const float* __restrict__ lse,
    const int64_t* __restrict__ target, Out* __restrict__ dlogits, int columns, int first, int classes, int64_t stride,
    int64_t dloss_stride, int tiles, Options options) {
  constexpr int V = vector_length<T, Out>(), K = kBackwardVectors;
  const int64_t row = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles, t = threadIdx.x, width = blockDim.x;
  const T* x = logits + row * stride;
  Out* dx = dlogits + row * columns;
  const Row<T, Out> in(x, columns, dx);
  RowGradient gradient = {};
  gradient.y = target[row];
  const bool ignored = gradient.y == options.ignore_index;
  if (!ignored) {
    const bool inside = gradient.y >= 0 && gradient.y < classes;
    const float upstream = inside ? dloss[row * dloss_stride] : NAN;
    gradient.lse = lse[row];
    gradient.at_target = upstream;
    if (!kPlain && inside) gradient.at_target *= (1.f - options.smoothing) * options.weight_of(int(gradient.y));
    gradient.share = gradient.at_target;
    if (!kPlain && options.smoothing > 0.f) {
      gradient.everywhere = options.smoothing / classes * upstream;
      gradient.share += gradient.everywhere * options.all_weights(classes);
    }
    if (options.z_loss != 0.f) gradient.share += 2.f * options.z_loss * gradient.lse * upstream;
  }

  for (int i = tile * width + t; i < in.singles; i += tiles * width) {
    const int c = in.single(i);
    float one[1] = {ignored ? 0.f : gradient.of<kPlain>(element(x + c), first + c, options)};
    Vec<Out, 1>::round(one).store(dx + c);
  }
  const T* from = x + in.lead;
  Out* to = dx + in.lead;
  Vec<T, V> loaded[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = (tile * K + k) * width + t;
    loaded[k] = Vec<T, V>::load_if(!ignored && i < in.vectors, from + int64_t(i) * V);
  }
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = (tile * K + k) * width + t;
    float out[V];
#pragma unroll
    for (int j = 0; j < V; j++)
      out[j] = ignored ? 0.f : gradient.of<kPlain>(loaded[k][j], i < in.vectors ? first + in.lead + i * V + j : 0, options);
    if (i < in.vectors) Vec<Out, V>::round(out).store(to + int64_t(i) * V);
  }
}

// ---- host side -----------------------------------------------------------------------------------------------------
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned threads_for(int64_t vectors, int most) {
  unsigned threads = kWarp;
  while (threads < unsigned(most) && threads < vectors) threads *= 2;
  return threads;
}

Options options_of(const CrossEntropy& a) {
  return {a.weight, a.weight_sum, a.ignore_index, a.smoothing, a.z_loss, a.softcap};
}

template <class T, bool kPlain>
int forward(const CrossEntropyForward& a, void* stream) {
  const unsigned threads = threads_for(ceil_div(a.classes, vector_length<T>()), kForwardThreads);
  if (a.rows * a.parts > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const int error = launch(cross_entropy_fwd_kernel<T, kPlain>, dim3(unsigned(a.rows * a.parts)), dim3(threads), stream,
                           static_cast<const T*>(a.logits), a.target, a.loss, a.lse, a.part, int(a.classes), a.stride,
                           int(a.parts), options_of(a));
  if (error || a.parts == 1) return error;
  return launch(cross_entropy_merge_kernel<T, kPlain>, dim3(unsigned(a.rows)), dim3(kWarp), stream,
                static_cast<const T*>(a.logits), a.target, static_cast<const float*>(a.part), a.loss, a.lse,
                int(a.classes), a.stride, int(a.parts), options_of(a));
}

template <class T, class Out, bool kPlain>
int backward(const CrossEntropyBackward& a, void* stream) {
  const int64_t vectors = ceil_div(a.columns, vector_length<T, Out>());
  const unsigned threads = threads_for(vectors, kBackwardThreads);
  const int64_t tiles = ceil_div(vectors, int64_t(threads) * kBackwardVectors);
  if (a.rows * tiles > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  return launch(cross_entropy_bwd_kernel<T, Out, kPlain>, dim3(unsigned(a.rows * tiles)), dim3(threads), stream, a.dloss,
                static_cast<const T*>(a.logits), a.lse, a.target, static_cast<Out*>(a.dlogits), int(a.columns),
                int(a.first), int(a.classes), a.stride, a.dloss_stride, int(tiles), options_of(a));
}

bool plain(const CrossEntropy& a) { return a.weight == nullptr && a.smoothing == 0.f && a.softcap == 0.f; }

}  // namespace

int cross_entropy_fwd(const CrossEntropyForward& a, void* stream) {
  if (a.rows == 0) return 0;
  return dispatch(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return plain(a) ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
  });
}

int cross_entropy_bwd(const CrossEntropyBackward& a, void* stream) {
  if (a.rows == 0 || a.columns == 0) return 0;
  return dispatch(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto as = [&](auto out) {
      using Out = typename decltype(out)::type;
      return plain(a) ? backward<T, Out, true>(a, stream) : backward<T, Out, false>(a, stream);
    };
    if constexpr (std::is_same_v<T, float>) return dispatch(a.dlogits_dtype, as);
    else return as(t);
  });
}

int64_t cross_entropy_fwd_parts(int64_t rows, int64_t classes, int64_t sm_count) {
  // Two blocks fill a multiprocessor. Rows alone do that from two per multiprocessor on; fewer are shared, but no block
  // gets less than one round of its threads.
  const int64_t wanted = 2 * (sm_count > 0 ? sm_count : 1);
  const int64_t most = ceil_div(classes, int64_t(kForwardThreads) * 8);
  const int64_t parts = rows > 0 ? wanted / rows : 1;
  return parts < 1 ? 1 : parts < most ? parts : most < 1 ? 1 : most;
}

}  // namespace pyllm
