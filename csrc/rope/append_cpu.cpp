// Rotary embedding of new tokens and their entry into a key-value cache on the CPU. Semantics: append_cpu.h.
//
// Bytes moved: q, k and v, read and written once. Everything is checked by then: bind_cpu_rope.cpp.
#include "append_cpu.h"

#include "rotate.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr int64_t kApart = 64;  // bytes of padding between what two threads write to

// n elements to places `step` apart.
template <class T>
inline void put(const T* from, int64_t n, T* to, int64_t step) {
  if (step == 1)
    memcpy(to, from, size_t(n) * sizeof(T));
  else
    for (int64_t i = 0; i < n; i++) to[i * step] = from[i];
}

template <class T>
inline void turn(const RopeAppend& a, const T* x, T* y, const ScalarOf<T>* cos, const ScalarOf<T>* sin) {
  turn_head<T>(
      a.R, a.interleaved, cos, sin, [&](int64_t i, auto m) { return load(x + i, m); },
      [&](int64_t i, auto v, auto m) { store(y + i, v, m); });
  if (a.R < a.D) memcpy(y + a.R, x + a.R, size_t(a.D - a.R) * sizeof(T));
}

template <class T>
void run(const RopeAppend& a) {
  using S = ScalarOf<T>;
  const int64_t tokens = a.B * a.T, elements = tokens * (a.H + 2 * a.Hkv) * a.D;
  if (elements == 0) return;
  // A token's angles, and a head for caches whose elements are not neighbours.
  const int64_t own = (2 * a.R * int64_t(sizeof(S)) + a.D * int64_t(sizeof(T)) + kApart + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(size_t(threads_for(tokens, elements) * own)));
  parallel_for(tokens, elements, [&](int64_t begin, int64_t end, int thread) {
    S* cos = reinterpret_cast<S*>(memory + thread * own);
    S* sin = cos + a.R;
    T* turned = reinterpret_cast<T*>(sin + a.R);
    for (int64_t token = begin; token < end; token++) {
      const int64_t b = token / a.T, t = token % a.T, p = a.lengths[b] - a.T + t, row = max64(p, 0);
      const Angles<S> from = {static_cast<const S*>(a.cos) + row * a.cos_stride,
                              static_cast<const S*>(a.sin) + row * a.sin_stride};
      prepare_angles<T>(from, a.table_step, a.R, a.interleaved, S(1), cos, sin);
      const T* q = static_cast<const T*>(a.q) + b * a.q_stride[0] + t * a.q_stride[1];
      T* q_out = static_cast<T*>(a.q_out) + token * a.H * a.D;
      for (int64_t head = 0; head < a.H; head++) turn(a, q + head * a.q_stride[2], q_out + head * a.D, cos, sin);
      if (p < 0) continue;
      const int64_t major = a.blocks ? a.blocks[b * a.block_stride + p / a.places] : b;
      const int64_t minor = a.blocks ? p % a.places : p;
      const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + t * a.k_stride[1];
      const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + t * a.v_stride[1];
      T* k_to = static_cast<T*>(a.k_cache) + major * a.k_cache_stride[0] + minor * a.k_cache_stride[1];
      T* v_to = static_cast<T*>(a.v_cache) + major * a.v_cache_stride[0] + minor * a.v_cache_stride[1];
      for (int64_t head = 0; head < a.Hkv; head++) {
        T* to = k_to + head * a.k_cache_stride[2];
        const bool dense = a.k_cache_stride[3] == 1;
        turn(a, k + head * a.k_stride[2], dense ? to : turned, cos, sin);
        if (!dense) put(turned, a.D, to, a.k_cache_stride[3]);
        put(v + head * a.v_stride[2], a.D, v_to + head * a.v_cache_stride[2], a.v_cache_stride[3]);
      }
    }
  });
}

}  // namespace

void rope_append(const RopeAppend& a) {
  switch (a.dtype) {
    case kFloat32: return run<float>(a);
    case kBFloat16: return run<bf16>(a);
    case kFloat16: return run<f16>(a);
    case kFloat64: return run<double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
