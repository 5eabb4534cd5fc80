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

template <class T>
void fwd(const SwigluFwd& a) {
  for_tiles(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
    T* y = static_cast<T*>(a.y) + row * a.cols + first;
    for_lanes<T, 2>(n, [&](int64_t i, auto m, auto) { store(y + i, silu(load(gate + i, m)) * load(up + i, m), m); });
  });
}

template <class T>
void bwd(const SwigluBwd& a) {
  for_tiles(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + first;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride + first;
    T* dup = static_cast<T*>(a.dup) + row * a.dup_stride + first;
    for_lanes<T, 2>(n, [&](int64_t i, auto m, auto) {
      const auto d = load(dy + i, m), g = load(gate + i, m), u = load(up + i, m);
      const auto s = sigmoid(g), silu = g * s;
      store(dup + i, d * silu, m);
      store(dgate + i, d * u * fma(silu, 1.f - s, s), m);  // silu'(g) = s + g s (1 - s)
    });
  });
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
