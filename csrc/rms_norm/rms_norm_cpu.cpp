// RMSNorm on the CPU (Zhang and Sennrich 2019). Formulas and shapes: rms_norm_cpu.h.
//
// Bytes moved, which is what the time goes to: forward reads x and writes y, backward reads dy and x and writes dx.
// Both read a row twice, but the second time it comes from the cache.
#include "rms_norm_cpu.h"

#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// Sum of a * b in accumulators that `index` picks; a pair takes two.
template <class V>
inline void add_product(V* sum, int index, V a, V b) { sum[index] = fma(a, b, sum[index]); }
inline void add_product(Vec* sum, int index, Pair a, Pair b) {
  sum[2 * index] = fma(a.even, b.even, sum[2 * index]);
  sum[2 * index + 1] = fma(a.odd, b.odd, sum[2 * index + 1]);
}

// offset + weight in the order in which for_pairs<kPairs> loads bf16: what is float32 in a row of bf16 must follow the
// bf16's order, which is brought about here once instead of in every row. Written to `to` only when there is a need.
template <bool kPairs, class S>
const S* prepare_weight(const S* weight, S offset, int64_t cols, S* to) {
  if (!weight || (!kPairs && offset == S(0))) return weight;  // no weight: no rows
  int64_t i = 0;
  if constexpr (kPairs)
    for (; i + 2 * kFloatLanes <= cols; i += 2 * kFloatLanes)
      for (int j = 0; j < kFloatLanes; j++) {
        to[i + j] = tame(offset + weight[i + 2 * j]);
        to[i + kFloatLanes + j] = tame(offset + weight[i + 2 * j + 1]);
      }
  for (; i < cols; i++) to[i] = tame(offset + weight[i]);
  return to;
}
// The way back, for columns that begin at a pair.
template <class S>
void restore_order(const S* from, int64_t cols, S* to) {
  int64_t i = 0;
  for (; i + 2 * kFloatLanes <= cols; i += 2 * kFloatLanes)
    for (int j = 0; j < kFloatLanes; j++) {
      to[i + 2 * j] = from[i + j];
      to[i + 2 * j + 1] = from[i + kFloatLanes + j];
    }
  for (; i < cols; i++) to[i] = from[i];
}

// Rows that go through the first pass together before they go through the second: between the two lies a chain of
// additions, a square root and divisions, and the CPU does it while it reads the next row. Only short rows: for long
// ones the chain does not matter, and they must stay in the first-level cache.
constexpr int kBatch = 4;
inline int64_t batch_rows(int64_t row_bytes) { return kBatch * row_bytes <= (8 << 10) ? kBatch : 1; }

// R is the residual's dtype, x's without one.
template <class T, class R, bool kAdd, bool kStream>
void fwd_rows(const RmsNormFwd& a) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  constexpr bool kPairs = kEvenOdd<T> && kEvenOdd<R>;
  S* prepared = static_cast<S*>(scratch(size_t(a.cols) * sizeof(S)));
  const S* weight = prepare_weight<kPairs>(static_cast<const S*>(a.weight), S(a.offset), a.cols, prepared);
  S* all_rstd = static_cast<S*>(a.rstd);
  const int64_t batch = batch_rows(a.cols * int64_t(sizeof(T)));
  parallel_for(a.rows, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t first = begin; first < end; first += batch) {
      const int64_t last = min64(first + batch, end);
      for (int64_t row = first; row < last; row++) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
        const R* residual = kAdd ? static_cast<const R*>(a.residual) + row * a.residual_stride : nullptr;
        R* h = kAdd ? static_cast<R*>(a.h) + row * a.cols : nullptr;
        V sum[4] = {};
        for_pairs<kPairs, T, 4>(a.cols, [&](int64_t i, auto m, auto index) {
          auto v = load(x + i, m);
          // the norm sees what the next layer will see
          if constexpr (kAdd) v = store_rounded(h + i, v + load(residual + i, m), m);
          add_product(sum, index, v, v);
        });
        const S mean = hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) / S(a.cols);
        all_rstd[row] = tame(S(1) / sqrt(mean + S(a.eps)));
      }
      for (int64_t row = first; row < last; row++) {
        const R* h = static_cast<const R*>(kAdd ? a.h : a.x) + row * (kAdd ? a.cols : a.x_stride);
        T* y = static_cast<T*>(a.y) + row * a.cols;
        const S rstd = all_rstd[row];
        for_pairs<kPairs, T, 2>(a.cols, [&](int64_t i, auto m, auto) {
          store_out<kStream>(y + i, load(h + i, m) * rstd * load(weight + i, m), m);
        });
      }
    }
    if constexpr (kStream) stream_fence();
  });
}

template <class T, class R, bool kAdd>
void fwd(const RmsNormFwd& a) {
  if constexpr (sizeof(T) == 4)
    if (worth_streaming(static_cast<T*>(a.y), a.cols, a.rows * a.cols)) return fwd_rows<T, R, kAdd, true>(a);
  fwd_rows<T, R, kAdd, false>(a);
}

// kRows rows. With xhat = x * rstd and g = dy * (offset + weight):
//   dx = rstd * (g - xhat * mean(g * xhat)) + dh         dweight += dy * xhat
// weight is what prepare_weight made, dweight in the same order.
template <int kRows, class G, class T, bool kDh, bool kStream>
void bwd_batch(const RmsNormBwd& a, int64_t row, const ScalarOf<T>* weight, ScalarOf<T>* dweight) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  constexpr bool kPairs = kEvenOdd<G> && kEvenOdd<T>;
  const G* dy = static_cast<const G*>(a.dy) + row * a.dy_stride;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* dh = kDh ? static_cast<const T*>(a.dh) + row * a.dh_stride : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.cols;

  S rstd[kRows], mean[kRows];
  for (int r = 0; r < kRows; r++) {
    V sum[4] = {};
    for_pairs<kPairs, T, 4>(a.cols, [&](int64_t i, auto m, auto index) {
      add_product(sum, index, load(dy + r * a.dy_stride + i, m) * load(weight + i, m), load(x + r * a.x_stride + i, m));
    });
    rstd[r] = tame(static_cast<const S*>(a.rstd)[row + r]);
    mean[r] = hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) * rstd[r] / S(a.cols);
  }
  for_pairs<kPairs, T, 1>(a.cols, [&](int64_t i, auto m, auto) {
    const auto w = load(weight + i, m);
    auto sum = load(dweight + i, m);
    for (int r = 0; r < kRows; r++) {
      const auto d = load(dy + r * a.dy_stride + i, m), xhat = load(x + r * a.x_stride + i, m) * rstd[r];
      auto result = (d * w - xhat * mean[r]) * rstd[r];
      if constexpr (kDh) result = result + load(dh + r * a.dh_stride + i, m);
      store_out<kStream>(dx + r * a.cols + i, result, m);
      sum = fma(d, xhat, sum);
    }
    store(dweight + i, sum, m);
  });
}

// dweight is a sum over rows. The rows are cut into chunks, each chunk sums into a row of its own in scratch memory,
// and the chunks are added at the end. Their number depends on nothing but `rows`: the result is the same, bit for bit,
// for any number of threads. It also makes the sum more accurate than one long chain of additions.
template <class G, class T, bool kDh, bool kStream>
void bwd_rows(const RmsNormBwd& a) {
  using S = ScalarOf<T>;
  constexpr int64_t kMinRows = 16, kMaxChunks = 128;
  const int64_t chunk_rows = max64(kMinRows, (a.rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (a.rows + chunk_rows - 1) / chunk_rows;
  constexpr bool kPairs = kEvenOdd<G> && kEvenOdd<T>;
  const int64_t batch = batch_rows(a.cols * int64_t(sizeof(T)));
  S* partial = static_cast<S*>(scratch(size_t((chunks + 1) * a.cols) * sizeof(S)));
  S* prepared = partial + chunks * a.cols;
  const S* weight = prepare_weight<kPairs>(static_cast<const S*>(a.weight), S(a.offset), a.cols, prepared);

  parallel_for(chunks, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      S* dweight = partial + chunk * a.cols;
      memset(dweight, 0, size_t(a.cols) * sizeof(S));
      const int64_t last = min64((chunk + 1) * chunk_rows, a.rows);
      int64_t row = chunk * chunk_rows;
      if constexpr (kPairs)  // for float32 the sums of dweight are not what takes the time
        for (; row + kBatch <= last && batch == kBatch; row += kBatch)
          bwd_batch<kBatch, G, T, kDh, kStream>(a, row, weight, dweight);
      for (; row < last; row++) bwd_batch<1, G, T, kDh, kStream>(a, row, weight, dweight);
    }
    if constexpr (kStream) stream_fence();
  });
  S* dweight = static_cast<S*>(a.dweight);
  S* sums = kPairs ? partial : dweight;
  constexpr int64_t kColumns = 64;  // a slice's edge falls between cache lines and between pairs
  parallel_for((a.cols + kColumns - 1) / kColumns, chunks * a.cols, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kColumns, count = min64(end * kColumns, a.cols) - first;
    for_lanes<S, 4>(count, [&](int64_t i, auto m, auto) {
      VecOf<S> sum = {};
      for (int64_t chunk = 0; chunk < chunks; chunk++) sum += load(partial + chunk * a.cols + first + i, m);
      store(sums + first + i, sum, m);
    });
    if constexpr (kPairs) restore_order(sums + first, count, dweight + first);
  });
}

template <class G, class T>
void bwd(const RmsNormBwd& a) {
  if constexpr (sizeof(T) == 4)
    if (worth_streaming(static_cast<T*>(a.dx), a.cols, a.rows * a.cols))
      return a.dh ? bwd_rows<G, T, true, true>(a) : bwd_rows<G, T, false, true>(a);
  a.dh ? bwd_rows<G, T, true, false>(a) : bwd_rows<G, T, false, false>(a);
}

// Second dtype of a pair whose first one is not float64.
template <class T>
void fwd_of(const RmsNormFwd& a) {
  if (!a.residual) return fwd<T, T, false>(a);
  switch (a.residual_dtype) {
    case kFloat32: return fwd<T, float, true>(a);
    case kBFloat16: return fwd<T, bf16, true>(a);
    case kFloat16: return fwd<T, f16, true>(a);
  }
}
template <class T>
void bwd_of(const RmsNormBwd& a) {
  switch (a.dy_dtype) {
    case kFloat32: return bwd<float, T>(a);
    case kBFloat16: return bwd<bf16, T>(a);
    case kFloat16: return bwd<f16, T>(a);
  }
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a) {
  switch (a.x_dtype) {
    case kFloat32: return fwd_of<float>(a);
    case kBFloat16: return fwd_of<bf16>(a);
    case kFloat16: return fwd_of<f16>(a);
    case kFloat64: return a.residual ? fwd<double, double, true>(a) : fwd<double, double, false>(a);
  }
}

void rms_norm_bwd(const RmsNormBwd& a) {
  switch (a.x_dtype) {
    case kFloat32: return bwd_of<float>(a);
    case kBFloat16: return bwd_of<bf16>(a);
    case kFloat16: return bwd_of<f16>(a);
    case kFloat64: return bwd<double, double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
