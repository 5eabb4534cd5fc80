// SwiGLU on the CPU (Shazeer 2020): the gate of a Llama MLP. Formulas and shapes: swiglu_cpu.h.
//
// Bytes moved: forward reads gate and up and writes y; backward reads dy, gate and up and writes dgate and dup.
// Nothing but gate and up is saved for the backward: one exp is cheaper than reading one more tensor.
#include "swiglu_cpu.h"

#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// Elements between two looks at the bookkeeping: enough to make it free, few enough to split one long row over threads.
constexpr int64_t kTile = 4096;

// body(row, first column, columns) over a matrix in tiles, in parallel.
template <class Body>
inline void for_tiles(int64_t rows, int64_t cols, const Body& body) {
  const int64_t per_row = (cols + kTile - 1) / kTile;
  parallel_for(rows * per_row, rows * cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t row = tile / per_row, first = tile % per_row * kTile;
      body(row, first, min64(kTile, cols - first));
    }
  });
}

template <class V>
inline V forward(V gate, V up) { return silu(gate) * up; }

template <class T, bool kStream>
void fwd_tiles(const SwigluFwd& a) {
  for_tiles(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
    T* y = static_cast<T*>(a.y) + row * a.cols + first;
    int64_t done = 0;
    if constexpr (sizeof(T) == 2)
      for (; done + 2 * kFloatLanes <= n; done += 2 * kFloatLanes) {
        const Pair g = load_pair(gate + done), u = load_pair(up + done);
        store_pair(y + done, Pair{forward(g.even, u.even), forward(g.odd, u.odd)});
      }
    for_lanes<T, 1>(n - done, [&](int64_t j, auto m, auto) {
      const int64_t i = done + j;
      store_out<kStream>(y + i, forward(load(gate + i, m), load(up + i, m)), m);
    });
    if constexpr (kStream) stream_fence();
  });
}

template <class V>
struct Gradients {
  V gate, up;
};
template <class V>
inline Gradients<V> backward(V dy, V gate, V up) {
  const V s = sigmoid(gate), silu = gate * s;
  return {dy * up * fma(silu, 1.f - s, s), dy * silu};  // silu'(g) = s + g s (1 - s)
}

template <class T, bool kStream>
void bwd_tiles(const SwigluBwd& a) {
  for_tiles(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + first;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride + first;
    T* dup = static_cast<T*>(a.dup) + row * a.dup_stride + first;
    int64_t done = 0;
    if constexpr (sizeof(T) == 2)
      for (; done + 2 * kFloatLanes <= n; done += 2 * kFloatLanes) {
        const Pair d = load_pair(dy + done), g = load_pair(gate + done), u = load_pair(up + done);
        const Gradients<Vec> even = backward(d.even, g.even, u.even), odd = backward(d.odd, g.odd, u.odd);
        store_pair(dgate + done, Pair{even.gate, odd.gate});
        store_pair(dup + done, Pair{even.up, odd.up});
      }
    for_lanes<T, 1>(n - done, [&](int64_t j, auto m, auto) {
      const int64_t i = done + j;
      const auto d = backward(load(dy + i, m), load(gate + i, m), load(up + i, m));
      store_out<kStream>(dup + i, d.up, m);
      store_out<kStream>(dgate + i, d.gate, m);
    });
    if constexpr (kStream) stream_fence();
  });
}

template <class T>
void fwd(const SwigluFwd& a) {
  if constexpr (sizeof(T) == 4)
    if (worth_streaming(static_cast<T*>(a.y), a.cols, a.rows * a.cols)) return fwd_tiles<T, true>(a);
  fwd_tiles<T, false>(a);
}

template <class T>
void bwd(const SwigluBwd& a) {
  const int64_t n = 2 * a.rows * a.cols;
  if constexpr (sizeof(T) == 4)
    if (worth_streaming(static_cast<T*>(a.dgate), a.dgate_stride, n) &&
        worth_streaming(static_cast<T*>(a.dup), a.dup_stride, n))
      return bwd_tiles<T, true>(a);
  bwd_tiles<T, false>(a);
}

}  // namespace

void swiglu_fwd(const SwigluFwd& args) {
  SwigluFwd a = args;
  if (a.gate_stride == a.cols && a.up_stride == a.cols) {  // one long row: tiles that short rows would not fill
    a.cols *= a.rows;
    a.rows = 1;
  }
  switch (a.dtype) {
    case kFloat32: return fwd<float>(a);
    case kBFloat16: return fwd<bf16>(a);
    case kFloat16: return fwd<f16>(a);
    case kFloat64: return fwd<double>(a);
  }
}

void swiglu_bwd(const SwigluBwd& args) {
  SwigluBwd a = args;
  if (a.dy_stride == a.cols && a.gate_stride == a.cols && a.up_stride == a.cols && a.dgate_stride == a.cols &&
      a.dup_stride == a.cols) {
    a.cols *= a.rows;
    a.rows = 1;
  }
  switch (a.dtype) {
    case kFloat32: return bwd<float>(a);
    case kBFloat16: return bwd<bf16>(a);
    case kFloat16: return bwd<f16>(a);
    case kFloat64: return bwd<double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
