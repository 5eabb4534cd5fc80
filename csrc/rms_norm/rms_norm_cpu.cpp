// RMSNorm on the CPU (Zhang and Sennrich 2019). Formulas and shapes: rms_norm_cpu.h.
//
// Bytes moved, which is what the time goes to: forward reads x and writes y, backward reads dy and x and writes dx.
// Both read a row twice, but the second time it comes from the cache.
#include "rms_norm_cpu.h"

#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

template <class T, class R, bool kAdd, bool kStream>
void fwd_rows(const RmsNormFwd& a) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  const S* weight = static_cast<const S*>(a.weight);
  const S offset = S(a.offset);
  parallel_for(a.rows, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row++) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      T* y = static_cast<T*>(a.y) + row * a.cols;
      const R* residual = kAdd ? static_cast<const R*>(a.residual) + row * a.residual_stride : nullptr;
      R* h = kAdd ? static_cast<R*>(a.h) + row * a.cols : nullptr;

      V sum[4] = {};
      for_lanes<T, 4>(a.cols, [&](int64_t i, auto m, auto k) {
        V v = load(x + i, m);
        if constexpr (kAdd) {
          v = rounded<R>(v + load(residual + i, m));  // the norm sees what the next layer will see
          store(h + i, v, m);
        }
        sum[k] = fma(v, v, sum[k]);
      });
      const S mean = hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) / S(a.cols);
      const S rstd = S(1) / sqrt(mean + S(a.eps));
      static_cast<S*>(a.rstd)[row] = rstd;

      for_lanes<T, 2>(a.cols, [&](int64_t i, auto m, auto) {
        V v;
        if constexpr (kAdd)
          v = load(h + i, m);
        else
          v = load(x + i, m);
        store_out<kStream>(y + i, v * rstd * (load(weight + i, m) + offset), m);
      });
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

// One row. With xhat = x * rstd and g = dy * (offset + weight):
//   dx = rstd * (g - xhat * mean(g * xhat)) + dh         dweight += dy * xhat
template <class G, class T, bool kDh, bool kStream>
void bwd_row(const RmsNormBwd& a, int64_t row, ScalarOf<T>* dweight) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  const S* weight = static_cast<const S*>(a.weight);
  const S offset = S(a.offset), rstd = static_cast<const S*>(a.rstd)[row];
  const G* dy = static_cast<const G*>(a.dy) + row * a.dy_stride;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* dh = kDh ? static_cast<const T*>(a.dh) + row * a.dh_stride : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.cols;

  V sum[4] = {};
  for_lanes<T, 4>(a.cols, [&](int64_t i, auto m, auto k) {
    const V g = load(dy + i, m) * (load(weight + i, m) + offset);
    sum[k] = fma(g, load(x + i, m), sum[k]);
  });
  const S mean = hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) * rstd / S(a.cols);

  for_lanes<T, 1>(a.cols, [&](int64_t i, auto m, auto) {
    const V d = load(dy + i, m), xhat = load(x + i, m) * rstd;
    V result = (d * (load(weight + i, m) + offset) - xhat * mean) * rstd;
    if constexpr (kDh) result += load(dh + i, m);
    store_out<kStream>(dx + i, result, m);
    store(dweight + i, fma(d, xhat, load(dweight + i, m)), m);
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
  S* partial = static_cast<S*>(scratch(size_t(chunks * a.cols) * sizeof(S)));

  parallel_for(chunks, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      S* dweight = partial + chunk * a.cols;
      memset(dweight, 0, size_t(a.cols) * sizeof(S));
      const int64_t last = min64((chunk + 1) * chunk_rows, a.rows);
      for (int64_t row = chunk * chunk_rows; row < last; row++)
        bwd_row<G, T, kDh, kStream>(a, row, dweight);
    }
    if constexpr (kStream) stream_fence();
  });
  S* dweight = static_cast<S*>(a.dweight);
  constexpr int64_t kColumns = 64;  // a slice's edge falls between cache lines
  parallel_for((a.cols + kColumns - 1) / kColumns, chunks * a.cols, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kColumns, count = min64(end * kColumns, a.cols) - first;
    for_lanes<S, 4>(count, [&](int64_t i, auto m, auto) {
      VecOf<S> sum = {};
      for (int64_t chunk = 0; chunk < chunks; chunk++) sum += load(partial + chunk * a.cols + first + i, m);
      store(dweight + first + i, sum, m);
    });
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
