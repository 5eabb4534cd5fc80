// Rotary position embedding on the CPU (Su et al. 2021). Formula and shapes: rope_cpu.h.
//
// Bytes moved: q and k, read and written once. q and k go together, so that a token's angles are fetched once for all
// of its heads.
#include "rope_cpu.h"

#include "../common/simd.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// A vector with the two of each pair of lanes exchanged.
inline Vec swap_pairs(Vec v) {
#if defined(__AVX512F__)
  return Vec(_mm512_permute_ps(__m512(v), 0xb1));
#elif defined(__AVX2__)
  return Vec(_mm256_permute_ps(__m256(v), 0xb1));
#elif defined(__aarch64__)
  return Vec(vrev64q_f32(float32x4_t(v)));
#else
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

// One head. cos and sin are the token's, R/2 values each.
template <bool kStream, class T>
inline void rotate_halves(const T* x, T* y, const ScalarOf<T>* cos, const ScalarOf<T>* sin, int64_t R) {
  const int64_t half = R / 2;
  for_lanes<T, 1>(half, [&](int64_t i, auto m, auto) {
    const auto c = load(cos + i, m), s = load(sin + i, m), a = load(x + i, m), b = load(x + half + i, m);
    store_out<kStream>(y + i, a * c - b * s, m);
    store_out<kStream>(y + half + i, b * c + a * s, m);
  });
}

// One head, neighbours paired. cos has every value twice, sin twice with signs (-, +): y = x * cos + swapped x * sin.
template <bool kStream, class T>
inline void rotate_pairs(const T* x, T* y, const ScalarOf<T>* cos, const ScalarOf<T>* sin, int64_t R) {
  if constexpr (Compute<T>::kLanes == 1) {
    for (int64_t i = 0; i < R; i++) y[i] = x[i] * cos[i] + x[i ^ 1] * sin[i];
  } else {
    for_lanes<T, 1>(R, [&](int64_t i, auto m, auto) {
      const auto v = load(x + i, m);
      store_out<kStream>(y + i, fma(v, load(cos + i, m), swap_pairs(v) * load(sin + i, m)), m);
    });
  }
}

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
      const S* from_cos = static_cast<const S*>(a.cos) + b * a.cos_stride[0] + row * a.cos_stride[1];
      const S* from_sin = static_cast<const S*>(a.sin) + b * a.sin_stride[0] + row * a.sin_stride[1];
      for (int64_t i = 0; i < a.R / 2; i++) {
        const S c = from_cos[i * a.table_step], s = from_sin[i * a.table_step] * turn;
        if (a.interleaved) {
          cos[2 * i] = cos[2 * i + 1] = c;
          sin[2 * i] = -s;
          sin[2 * i + 1] = s;
        } else {
          cos[i] = c;
          sin[i] = s;
        }
      }
      for (const Heads<T>& side : sides) {
        const T* x = side.x + b * side.stride[0] + t * side.stride[1];
        T* y = side.y + token * side.count * a.D;
        for (int64_t head = 0; head < side.count; head++, x += side.stride[2], y += a.D) {
          if (a.interleaved)
            rotate_pairs<kStream>(x, y, cos, sin, a.R);
          else
            rotate_halves<kStream>(x, y, cos, sin, a.R);
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
