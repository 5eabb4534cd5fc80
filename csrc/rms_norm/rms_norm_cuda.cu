// RMSNorm, with or without the residual addition before it, forward and backward.
//
//   h = x + residual                       rounded to the residual's dtype; without a residual h is x
//   rstd = 1 / sqrt(mean(h^2) + eps)
//   y = h * rstd * (offset + weight)       computed in float32, rounded once to x's dtype
//
// and, with g = dy * (offset + weight), u = h * rstd:
//
//   dx = rstd * (g - u * mean(g * u)) + dh          dweight = sum over rows of dy * u
//
// A row is shared by `width` = blockDim.x threads: part of a warp for short rows, blockDim.y of which then go into a
// block, else the whole block. Thread t works on vectors t, t + width, t + 2 * width... of V elements. The first K of
// them stay in registers from the first pass (the sum) to the second (the result), so that memory is read once. Rows
// longer than K * width vectors are finished by a loop that reads the rest again, which then mostly comes from L2.
// Where rows don't start at multiples of 16 bytes, V is 1.
//
// Legend: C cols, X dtype of x and y, H of residual and h, W of weight, D of dy.
#include "rms_norm/rms_norm_cuda.h"

#include "common/launch.cuh"

namespace pyllm {
namespace {

constexpr int kForwardThreads = 512, kBackwardThreads = 512;
constexpr int kVectorsKept = 4, kScalarsKept = 8;  // K where V > 1, and where V is 1
constexpr int kVectorsAhead = 2;  // K of the backward of rows of medium length: it leaves registers for the next row
// __launch_bounds__ names one block per multiprocessor below: unasked, ptxas aims at more and spills for it. Loops over
// what registers don't hold are not unrolled, for the same reason: they are the exception.

// Sum over the threads of a row.
__device__ __forceinline__ float row_sum(float x, int turn = 0) {
  return blockDim.x <= kWarp ? warp_sum(x, blockDim.x) : block_sum(x, turn);
}

template <class X, class H, int V>
__device__ __forceinline__ Vec<H, V> add(const Vec<X, V>& x, const Vec<H, V>& residual) {
  float sum[V];
#pragma unroll
  for (int j = 0; j < V; j++) sum[j] = x[j] + residual[j];
  return Vec<H, V>::round(sum);
}

template <class H, int V>
__device__ __forceinline__ float sum_of_squares(const Vec<H, V>& h) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < V; j++) sum += h[j] * h[j];
  return sum;
}

// y of the formula.
template <class X, class H, class W, int V>
__device__ __forceinline__ Vec<X, V> scaled(const Vec<H, V>& h, float rstd, float offset, const Vec<W, V>& weight) {
  float y[V];
#pragma unroll
  for (int j = 0; j < V; j++) y[j] = h[j] * rstd * (offset + weight[j]);
  return Vec<X, V>::round(y);
}

// Grid: one block per blockDim.y rows.
// Bytes, the floor: C * (X read + X written) a row; with a residual also C * (H read + H written). The weight and rstd
// add C * W once and 4 a row.
template <class X, class H, class W, bool kAdd, int V, int K>
__global__ void __launch_bounds__(kForwardThreads, 1) rms_norm_fwd_kernel(
    const X* __restrict__ x, const H* __restrict__ residual, const W* __restrict__ weight, X* __restrict__ y,
    H* __restrict__ h, float* __restrict__ rstd, int64_t rows, int cols, int64_t x_stride, int64_t residual_stride,
    float eps, float offset) {
  const int t = threadIdx.x, width = blockDim.x;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < rows;              // the last block may have fewer rows; its threads still join the sums
  const int vectors = live ? cols / V : 0;
  x += row * x_stride;
  y += row * cols;
  if (kAdd) {
    residual += row * residual_stride;
    h += row * cols;
  }

  // Every load of the row is on its way before the first result is needed.
  Vec<X, V> in[K];
  Vec<H, V> kept[K];
  Vec<W, V> scale[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = t + k * width;
    in[k] = Vec<X, V>::load_if(i < vectors, x + i * V);
    if constexpr (kAdd) kept[k] = Vec<H, V>::load_if(i < vectors, residual + i * V);
  }
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = t + k * width;
    scale[k] = Vec<W, V>::load_if(i < vectors, weight + i * V);
  }

  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = t + k * width;
    if constexpr (kAdd) {
      kept[k] = add(in[k], kept[k]);
      if (i < vectors) kept[k].store(h + i * V);
    } else {
      kept[k] = in[k];
    }
    squares += sum_of_squares(kept[k]);
  }
#pragma unroll 1
  for (int i = t + K * width; i < vectors; i += width) {
    const auto a = Vec<X, V>::load(x + i * V);
    if constexpr (kAdd) {
      const auto sum = add(a, Vec<H, V>::load(residual + i * V));
      sum.store(h + i * V);
      squares += sum_of_squares(sum);
    } else {
      squares += sum_of_squares(a);
    }
  }

  const float r = rsqrtf(row_sum(squares) / cols + eps);
  if (live && t == 0) rstd[row] = r;

#pragma unroll
  for (int k = 0; k < K; k++) {
    const int i = t + k * width;
    kept[k].stay_packed();
    const auto out = scaled<X>(kept[k], r, offset, scale[k]);
    if (i < vectors) out.store(y + i * V);
  }
#pragma unroll 1
  for (int i = t + K * width; i < vectors; i += width) {
    // h was written by this very thread; x is only read.
    const auto a = [&] {
      if constexpr (kAdd) return Vec<H, V>::load(h + i * V);
      else return Vec<X, V>::load(x + i * V);
    }();
    scaled<X>(a, r, offset, Vec<W, V>::load(weight + i * V)).store(y + i * V);
  }
}

// dx of the formula; `mean` is that of g * u.
template <class X, class D, class W, int V>
__device__ __forceinline__ Vec<X, V> input_gradient(const Vec<X, V>& x, const Vec<D, V>& dy, const Vec<W, V>& weight,
                                                    const Vec<X, V>& dh, float rstd, float mean, float offset) {
  float dx[V];
#pragma unroll
  for (int j = 0; j < V; j++) dx[j] = rstd * (dy[j] * (offset + weight[j]) - x[j] * rstd * mean) + dh[j];
  return Vec<X, V>::round(dx);
}

// Grid: `parts` blocks, each walks over the rows with stride parts * blockDim.y and adds up its own dweight in
// registers, which becomes row blockIdx.x of `partial`: no atomics, the same bits every time.
// Bytes, the floor: C * (D + X read + X written) a row, with dh C * X more; partial is written and read once.
template <class D, class X, class W, int V, int K>
__global__ void __launch_bounds__(kBackwardThreads, 1) rms_norm_bwd_kernel(
    const D* __restrict__ dy, const X* __restrict__ dh, const X* __restrict__ x, const W* __restrict__ weight,
    const float* __restrict__ rstd, X* __restrict__ dx, float* __restrict__ partial, int64_t rows, int cols,
    int64_t dy_stride, int64_t dh_stride, int64_t x_stride, float offset) {
  const int t = threadIdx.x, width = blockDim.x, groups = blockDim.y;
  partial += int64_t(blockIdx.x) * cols;

  float dweight[K][V] = {};
  // Columns that no thread keeps: their dweight lives in `partial`. Four floats at a time at most: neighbouring
  // threads then touch neighbouring memory.
  constexpr int N = V < 4 ? V : 4;
  const int rest = K * width * V + t * N;
#pragma unroll 1
  for (int c = rest; c < cols; c += width * N) Vec<float, N>::load_if(false, partial).store(partial + c);

  // Where there are registers, the next row is on its way while this one is summed and stored.
  constexpr bool kAhead = V > 1 && K == kVectorsAhead;
  Vec<X, V> ahead_in[K];
  Vec<D, V> ahead_grad[K];
  auto fetch = [&](int64_t row) {
    const int vectors = row < rows ? cols / V : 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int i = t + k * width;
      ahead_in[k] = Vec<X, V>::load_if(i < vectors, x + row * x_stride + i * V);
      ahead_grad[k] = Vec<D, V>::load_if(i < vectors, dy + row * dy_stride + i * V);
    }
  };
  if (kAhead) fetch(int64_t(blockIdx.x) * groups + threadIdx.y);

  int turn = 0;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < rows; first += int64_t(gridDim.x) * groups) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < rows;
    const int live_cols = live ? cols : 0, vectors = live_cols / V;
    const X* x_row = x + row * x_stride;
    const D* dy_row = dy + row * dy_stride;
    const X* dh_row = dh + row * dh_stride;
    X* dx_row = dx + row * cols;
    const float r = live ? rstd[row] : 0.f;

    Vec<X, V> in[K], sum_grad[K];
    Vec<D, V> grad[K];
    if (!kAhead) fetch(row);
#pragma unroll
    for (int k = 0; k < K; k++) in[k] = ahead_in[k], grad[k] = ahead_grad[k];
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int i = t + k * width;
      sum_grad[k] = Vec<X, V>::load_if(dh != nullptr && i < vectors, dh_row + i * V);
    }

    float dot = 0.f;  // of g and u
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int i = t + k * width;
      const auto w = Vec<W, V>::load_if(i < vectors, weight + i * V);
#pragma unroll
      for (int j = 0; j < V; j++) {
        const float du = grad[k][j] * (in[k][j] * r);
        dweight[k][j] += du;
        dot += du * (offset + w[j]);
      }
    }
    if (kAhead) fetch(row + int64_t(gridDim.x) * groups);
#pragma unroll 1
    for (int c = rest; c < live_cols; c += width * N) {
      const auto a = Vec<X, N>::load(x_row + c);
      const auto d = Vec<D, N>::load(dy_row + c);
      const auto w = Vec<W, N>::load(weight + c);
      const auto before = Vec<float, N>::load(partial + c);
      float sum[N];
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float du = d[j] * (a[j] * r);
        sum[j] = before[j] + du;
        dot += du * (offset + w[j]);
      }
      Vec<float, N>::round(sum).store(partial + c);
    }

    const float mean = row_sum(dot, turn++) / cols;

    // The weight is read again, from L1: to keep it as well, there are not enough registers.
    Vec<W, V> scale[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int i = t + k * width;
      scale[k] = Vec<W, V>::load_if(i < vectors, weight + i * V);
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int i = t + k * width;
      in[k].stay_packed();
      grad[k].stay_packed();
      const auto out = input_gradient(in[k], grad[k], scale[k], sum_grad[k], r, mean, offset);
      if (i < vectors) out.store(dx_row + i * V);
    }
#pragma unroll 1
    for (int c = rest; c < live_cols; c += width * N) {
      const auto a = Vec<X, N>::load(x_row + c);
      const auto d = Vec<D, N>::load(dy_row + c);
      const auto w = Vec<W, N>::load(weight + c);
      const auto extra = Vec<X, N>::load_if(dh != nullptr, dh_row + c);
      input_gradient(a, d, w, extra, r, mean, offset).store(dx_row + c);
    }
  }

  // Now the block's rows are added up, and the sums change hands: a thread holds V neighbouring columns, but stores are
  // cheapest when 32 neighbouring threads store 32 neighbouring floats. Element j of everyone's vectors goes to plane j
  // of `stage`. Planes are kPlane apart, which is 32 / V modulo the 32 banks: column c is read from bank
  // (c % V) * 32 / V + c / V, a different one for each of 32 neighbouring columns.
  constexpr int kPlane = kBackwardThreads + kWarp / V;
  __shared__ float stage[V * kPlane];
  const int thread = t + width * threadIdx.y, span = width * V;
#pragma unroll
  for (int k = 0; k < K; k++) {
    if (k * span < cols) {
      if (k > 0) __syncthreads();  // the stage may still be read
#pragma unroll
      for (int j = 0; j < V; j++) stage[j * kPlane + thread] = dweight[k][j];
      __syncthreads();
#pragma unroll 1
      for (int c = thread; c < span && k * span + c < cols; c += width * groups) {
        float sum = 0.f;
#pragma unroll 1
        for (int group = 0; group < groups; group++) sum += stage[c % V * kPlane + group * width + c / V];
        partial[k * span + c] = sum;
      }
    }
  }
}

// dweight = sum over the rows of partial, in an order that depends on `parts` alone.
// Grid: one block per 32 columns; its warps take rows in turn.
__global__ void __launch_bounds__(kWarp * kWarp) rms_norm_dweight_kernel(
    const float* __restrict__ partial, float* __restrict__ dweight, int64_t parts, int cols) {
  __shared__ float sums[kWarp][kWarp];
  const int lane = threadIdx.x, warp = threadIdx.y, col = blockIdx.x * kWarp + lane;
  float sum = 0.f;
  if (col < cols) {
#pragma unroll 4
    for (int64_t part = warp; part < parts; part += blockDim.y) sum += partial[part * cols + col];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || col >= cols) return;
  for (int other = 1; other < int(blockDim.y); other++) sum += sums[other][lane];
  dweight[col] = sum;
}

// ---- host side -----------------------------------------------------------------------------------------------------
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads for a row of so many vectors, and rows for a block. A warp or part of one while K vectors per lane suffice:
// no barriers. Beyond, two vectors per thread, more only where a block ends: many loads in flight, many warps to hide
// what latency remains.
dim3 block_shape(int64_t vectors, int kept, int most_threads, int short_rows_threads) {
  unsigned width = 1;
  if (vectors <= kept * kWarp) {
    while (width < kWarp && width < vectors) width *= 2;
    return dim3(width, short_rows_threads / width);
  }
  const int64_t warps = ceil_div(vectors, 2 * kWarp);
  return dim3(unsigned(warps * kWarp < most_threads ? warps * kWarp : most_threads));
}

template <class X, class H, class W, bool kAdd, int V, int K>
int forward(const RmsNormForward& a, void* stream) {
  const dim3 block = block_shape(a.cols / V, K, kForwardThreads, 128);
  const int64_t blocks = ceil_div(a.rows, block.y);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  return launch(rms_norm_fwd_kernel<X, H, W, kAdd, V, K>, dim3(unsigned(blocks)), block, stream,
                static_cast<const X*>(a.x), static_cast<const H*>(a.residual), static_cast<const W*>(a.weight),
                static_cast<X*>(a.y), static_cast<H*>(a.h), a.rstd, a.rows, int(a.cols), a.x_stride,
                a.residual_stride, a.eps, a.offset);
}

template <class X, class H, class W, bool kAdd>
int forward_by_alignment(const RmsNormForward& a, void* stream) {
  constexpr int V = vector_length<X, H, W>();
  // The row stride of y and h is C, so this also asks for whole vectors.
  const bool fit = vectors_fit<X, V>(static_cast<const X*>(a.x), a.x_stride) &&
                   vectors_fit<H, V>(static_cast<const H*>(a.residual), a.residual_stride) &&
                   vectors_fit<W, V>(static_cast<const W*>(a.weight), 0) &&
                   vectors_fit<X, V>(static_cast<X*>(a.y), a.cols) && vectors_fit<H, V>(static_cast<H*>(a.h), a.cols);
  return fit ? forward<X, H, W, kAdd, V, kVectorsKept>(a, stream) : forward<X, H, W, kAdd, 1, kScalarsKept>(a, stream);
}

template <class X, class H, bool kAdd>
int forward_by_weight(const RmsNormForward& a, void* stream) {
  if (a.weight_dtype == DType::kFloat32) return forward_by_alignment<X, H, float, kAdd>(a, stream);
  if (a.weight_dtype == a.x_dtype) return forward_by_alignment<X, H, X, kAdd>(a, stream);
  return int(cudaErrorInvalidValue);
}

template <class D, class X, class W, int V, int K>
int backward(const RmsNormBackward& a, void* stream) {
  const dim3 block = block_shape(a.cols / V, K, kBackwardThreads, 256);
  return launch(rms_norm_bwd_kernel<D, X, W, V, K>, dim3(unsigned(a.parts)), block, stream,
                static_cast<const D*>(a.dy), static_cast<const X*>(a.dh), static_cast<const X*>(a.x),
                static_cast<const W*>(a.weight), a.rstd, static_cast<X*>(a.dx), a.partial, a.rows, int(a.cols),
                a.dy_stride, a.dh_stride, a.x_stride, a.offset);
}

template <class D, class X, class W>
int backward_by_alignment(const RmsNormBackward& a, void* stream) {
  constexpr int V = vector_length<D, X, W>();
  const bool fit = vectors_fit<D, V>(static_cast<const D*>(a.dy), a.dy_stride) &&
                   vectors_fit<X, V>(static_cast<const X*>(a.dh), a.dh_stride) &&
                   vectors_fit<X, V>(static_cast<const X*>(a.x), a.x_stride) &&
                   vectors_fit<W, V>(static_cast<const W*>(a.weight), 0) &&
                   vectors_fit<X, V>(static_cast<X*>(a.dx), a.cols) && vectors_fit<float, 4>(a.partial, 0);
  if (!fit) return backward<D, X, W, 1, kScalarsKept>(a, stream);
  const int64_t vectors = a.cols / V;  // more than a warp keeps, but no more than a block does
  return vectors > kVectorsKept * kWarp && vectors <= kVectorsAhead * kBackwardThreads
             ? backward<D, X, W, V, kVectorsAhead>(a, stream)
             : backward<D, X, W, V, kVectorsKept>(a, stream);
}

template <class D, class X>
int backward_by_weight(const RmsNormBackward& a, void* stream) {
  if (a.weight_dtype == DType::kFloat32) return backward_by_alignment<D, X, float>(a, stream);
  if (a.weight_dtype == a.x_dtype) return backward_by_alignment<D, X, X>(a, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace

int rms_norm_fwd(const RmsNormForward& a, void* stream) {
  if (a.rows == 0) return 0;
  return dispatch(a.x_dtype, [&](auto x) {
    using X = typename decltype(x)::type;
    if (a.residual == nullptr) return forward_by_weight<X, X, false>(a, stream);
    if (a.residual_dtype == a.x_dtype) return forward_by_weight<X, X, true>(a, stream);
    if (a.residual_dtype == DType::kFloat32) return forward_by_weight<X, float, true>(a, stream);
    return int(cudaErrorInvalidValue);
  });
}

int rms_norm_bwd(const RmsNormBackward& a, void* stream) {
  if (a.cols == 0) return 0;
  const int error = dispatch(a.dy_dtype, [&](auto dy) {
    using D = typename decltype(dy)::type;
    if (a.x_dtype == a.dy_dtype) return backward_by_weight<D, D>(a, stream);
    if (a.x_dtype == DType::kFloat32) return backward_by_weight<D, float>(a, stream);
    return int(cudaErrorInvalidValue);
  });
  if (error) return error;
  unsigned warps = 1;
  while (warps < kWarp && warps < a.parts) warps *= 2;
  return launch(rms_norm_dweight_kernel, dim3(unsigned(ceil_div(a.cols, kWarp))), dim3(kWarp, warps), stream,
                static_cast<const float*>(a.partial), a.dweight, a.parts, int(a.cols));
}

int64_t rms_norm_bwd_parts(int64_t rows, int64_t cols, int64_t sm_count) {
  // Enough blocks to keep the memory busy, few enough that writing and summing their partials stays a small share:
  // two per multiprocessor for wide rows, up to four where rows are short; none without rows of its own.
  const int64_t rows_per_block = cols > 0 && cols < 2048 ? 2048 / cols : 1;
  const int64_t per_sm = cols <= 2048 ? 4 : 2;
  const int64_t useful = ceil_div(rows, rows_per_block), most = per_sm * (sm_count > 0 ? sm_count : 1);
  return useful < 1 ? 1 : useful < most ? useful : most;
}

}  // namespace pyllm
