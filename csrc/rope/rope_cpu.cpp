// Rotary position embedding on the CPU (Su et al. 2021). Formula and shapes: rope_cpu.h.
//
// Bytes moved: q and k, read and written once. q and k go together, so that a token's angles are fetched once for all
// of its heads.
#include "rope_cpu.h"

#include "rotate.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

template <class T>
struct Heads {
  const T* x;
  T* y;
  const int64_t* stride;
  int64_t count;
};

template <class T, bool kStream>
void run(const Rope& a) {
  using S = ScalarOf<T>;
  const int64_t tokens = a.B * a.T, heads = a.H + a.Hkv, elements = tokens * heads * a.D;
  const Heads<T> sides[2] = {{static_cast<const T*>(a.q), static_cast<T*>(a.q_out), a.q_stride, a.H},
                             {static_cast<const T*>(a.k), static_cast<T*>(a.k_out), a.k_stride, a.Hkv}};
  // A token's cos and sin in the order the heads want them, signs included: R values each, per thread, 16 values of
  // padding between threads so that they do not write to one cache line.
  const int64_t table = 2 * a.R + 16;
  S* tables = static_cast<S*>(scratch(size_t(threads_for(tokens, elements) * table) * sizeof(S)));
  const S turn = a.conjugate ? S(-1) : S(1);

  parallel_for(tokens, elements, [&](int64_t begin, int64_t end, int thread) {
    S* cos = tables + thread * table;
    S* sin = cos + a.R;
    for (int64_t token = begin; token < end; token++) {
      const int64_t b = token / a.T, t = token % a.T, row = a.positions ? a.positions[token] : t;
      const Angles<S> from = {static_cast<const S*>(a.cos) + b * a.cos_stride[0] + row * a.cos_stride[1],
                              static_cast<const S*>(a.sin) + b * a.sin_stride[0] + row * a.sin_stride[1]};
      prepare_angles<T>(from, a.table_step, a.R, a.interleaved, turn, cos, sin);
      for (const Heads<T>& side : sides) {
        const T* x = side.x + b * side.stride[0] + t * side.stride[1];
        T* y = side.y + token * side.count * a.D;
        for (int64_t head = 0; head < side.count; head++, x += side.stride[2], y += a.D) {
          turn_head<T>(
              a.R, a.interleaved, cos, sin, [&](int64_t i, auto m) { return load(x + i, m); },
              [&](int64_t i, auto v, auto m) { store_out<kStream>(y + i, v, m); });
          if (a.R < a.D) memcpy(y + a.R, x + a.R, size_t(a.D - a.R) * sizeof(T));
        }
      }
    }
    if constexpr (kStream) stream_fence();
  });
}

// Every head and every half of one must begin at a vector's boundary.
bool streams(const Rope& a) {
  const int64_t elements = a.B * a.T * (a.H + a.Hkv) * a.D;
  return worth_streaming(static_cast<float*>(a.q_out), a.D, elements) &&
         worth_streaming(static_cast<float*>(a.k_out), a.interleaved ? a.D : a.R / 2, elements);
}

}  // namespace

void rope(const Rope& a) {
  switch (a.dtype) {
    case kFloat32: return streams(a) ? run<float, true>(a) : run<float, false>(a);
    case kBFloat16: return run<bf16, false>(a);
    case kFloat16: return run<f16, false>(a);
    case kFloat64: return run<double, false>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
