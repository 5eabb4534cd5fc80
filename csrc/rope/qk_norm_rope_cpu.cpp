// QK-norm and rotary embedding in one pass on the CPU (Henry et al. 2020, Su et al. 2021). Formulas: qk_norm_rope_cpu.h.
//
// Bytes moved: forward reads and writes q and k, backward reads their gradients and them, and writes two tensors more.
// A head is read twice, but it stays in the first-level cache meanwhile.
#include "qk_norm_rope_cpu.h"

#include "rotate.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// offset + weight in the order in which a head is walked: its two halves, then what is not turned.
template <class T, class S>
void prepare_weight(const QkNormSide& side, const QkNormRope& a, S* to) {
  constexpr bool kPairs = kTurnsInPairs<T>;
  const S* weight = static_cast<const S*>(side.weight);
  if (a.table.interleaved) {
    in_order<false>(weight, 1, S(1), a.R, to);
  } else {
    in_order<kPairs>(weight, 1, S(1), a.R / 2, to);
    in_order<kPairs>(weight + a.R / 2, 1, S(1), a.R / 2, to + a.R / 2);
  }
  in_order<kPairs>(weight + a.R, 1, S(1), a.D - a.R, to + a.R);
  for (int64_t i = 0; i < a.D; i++) to[i] = tame(to[i] + S(a.offset));
}

// The way back, of in_order().
template <bool kPairs, class S>
void out_of_order(const S* from, int64_t n, S* to) {
  int64_t i = 0;
  if constexpr (kPairs)
    for (; i + 2 * kFloatLanes <= n; i += 2 * kFloatLanes)
      for (int j = 0; j < kFloatLanes; j++) {
        to[i + 2 * j] = from[i + j];
        to[i + 2 * j + 1] = from[i + kFloatLanes + j];
      }
  for (; i < n; i++) to[i] = from[i];
}
template <class T, class S>
void store_dweight(const S* from, const QkNormRope& a, S* to) {
  constexpr bool kPairs = kTurnsInPairs<T>;
  if (a.table.interleaved) {
    out_of_order<false>(from, a.R, to);
  } else {
    out_of_order<kPairs>(from, a.R / 2, to);
    out_of_order<kPairs>(from + a.R / 2, a.R / 2, to + a.R / 2);
  }
  out_of_order<kPairs>(from + a.R, a.D - a.R, to + a.R);
}

template <class S>
inline Angles<S> angles_of(const QkNormRope& a, int64_t token) {
  const int64_t b = token / a.T, row = a.table.positions ? a.table.positions[token] : token % a.T;
  return {static_cast<const S*>(a.table.cos) + b * a.table.cos_stride[0] + row * a.table.cos_stride[1],
          static_cast<const S*>(a.table.sin) + b * a.table.sin_stride[0] + row * a.table.sin_stride[1]};
}

// Sum of products in accumulators that `index` picks; a pair takes two.
template <class V>
inline void add_product(V* sum, int index, V a, V b) { sum[index] = fma(a, b, sum[index]); }
inline void add_product(Vec* sum, int index, Pair a, Pair b) {
  sum[2 * index] = fma(a.even, b.even, sum[2 * index]);
  sum[2 * index + 1] = fma(a.odd, b.odd, sum[2 * index + 1]);
}

// Padding between what two threads write to, in elements.
constexpr int64_t kApart = 16;

inline int64_t elements_of(const QkNormRope& a) { return a.B * a.T * (a.sides[0].heads + a.sides[1].heads) * a.D; }

template <class T>
void fwd(const QkNormRope& a) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  constexpr bool kPairs = kTurnsInPairs<T>;
  const int64_t tokens = a.B * a.T, D = a.D, own = 2 * a.R + kApart;
  if (elements_of(a) == 0) return;
  S* memory = static_cast<S*>(scratch(size_t(2 * D + threads_for(tokens, elements_of(a)) * own) * sizeof(S)));
  S* weights[2] = {memory, memory + D};
  for (int i = 0; i < 2; i++)
    if (a.sides[i].heads) prepare_weight<T>(a.sides[i], a, weights[i]);

  parallel_for(tokens, elements_of(a), [&](int64_t begin, int64_t end, int thread) {
    S* cos = memory + 2 * D + thread * own;
    S* sin = cos + a.R;
    for (int64_t token = begin; token < end; token++) {
      prepare_angles<T>(angles_of<S>(a, token), a.table.step, a.R, a.table.interleaved, S(1), cos, sin);
      for (int i = 0; i < 2; i++) {
        const QkNormSide& side = a.sides[i];
        const S* weight = weights[i];
        const T* x = static_cast<const T*>(side.x) + token / a.T * side.x_stride[0] + token % a.T * side.x_stride[1];
        T* y = static_cast<T*>(side.y) + token * side.heads * D;
        S* rstds = static_cast<S*>(side.rstd) + token * side.heads;
        for (int64_t head = 0; head < side.heads; head++, x += side.x_stride[2], y += D) {
          V sum[4] = {};
          for_pairs<kPairs, T, 4>(D, [&](int64_t j, auto m, auto index) {
            const auto v = load(x + j, m);
            add_product(sum, index, v, v);
          });
          const S mean = hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) / S(D);
          const S rstd = rstds[head] = tame(S(1) / sqrt(mean + S(a.eps)));
          turn_head<T>(
              a.R, a.table.interleaved, cos, sin,
              [&](int64_t j, auto m) { return load(x + j, m) * rstd * load(weight + j, m); },
              [&](int64_t j, auto v, auto m) { store(y + j, v, m); });
          for_pairs<kPairs, T, 1>(D - a.R, [&](int64_t j, auto m, auto) {
            store(y + a.R + j, load(x + a.R + j, m) * rstd * load(weight + a.R + j, m), m);
          });
        }
      }
    }
  });
}

// With g = dy turned back, the gradient of n, and x^ = x * rstd:
//   dx = rstd * (g w - x^ * mean(g w x^)), w = offset + weight        dweight = sum over tokens and heads of g * x^
// A head's g waits in memory of the thread's own for the mean. dweight is summed in chunks of tokens, whose number
// depends on nothing but the tokens': the same bits for any number of threads.
template <class T>
void bwd(const QkNormRope& a) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  constexpr bool kPairs = kTurnsInPairs<T>;
  constexpr int64_t kMinTokens = 16, kMaxChunks = 128;
  const int64_t tokens = a.B * a.T, D = a.D, own = 2 * a.R + D + kApart;
  const int64_t chunk_tokens = max64(kMinTokens, (tokens + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunks = (tokens + chunk_tokens - 1) / chunk_tokens, elements = elements_of(a);
  S* memory = static_cast<S*>(scratch(size_t((2 + 2 * chunks) * D + threads_for(chunks, elements) * own) * sizeof(S)));
  S* weights[2] = {memory, memory + D};
  S* partial = memory + 2 * D;  // (chunks, 2, D)
  S* owned = partial + chunks * 2 * D;
  for (int i = 0; i < 2; i++)
    if (tokens && a.sides[i].heads) prepare_weight<T>(a.sides[i], a, weights[i]);

  parallel_for(chunks, elements, [&](int64_t begin, int64_t end, int thread) {
    S* cos = owned + thread * own;
    S* sin = cos + a.R;
    S* g = sin + a.R;
    for (int64_t chunk = begin; chunk < end; chunk++) {
      memset(partial + chunk * 2 * D, 0, size_t(2 * D) * sizeof(S));
      for (int64_t token = chunk * chunk_tokens; token < min64((chunk + 1) * chunk_tokens, tokens); token++) {
        const int64_t b = token / a.T, t = token % a.T;
        if (elements) prepare_angles<T>(angles_of<S>(a, token), a.table.step, a.R, a.table.interleaved, S(-1), cos, sin);
        for (int i = 0; i < 2; i++) {
          const QkNormSide& side = a.sides[i];
          const S* weight = weights[i];
          S* dweight = partial + (chunk * 2 + i) * D;
          const T* x = static_cast<const T*>(side.x) + b * side.x_stride[0] + t * side.x_stride[1];
          const T* dy = static_cast<const T*>(side.dy) + b * side.dy_stride[0] + t * side.dy_stride[1];
          T* dx = static_cast<T*>(side.y) + token * side.heads * D;
          const S* rstds = static_cast<const S*>(side.rstd) + token * side.heads;
          for (int64_t head = 0; head < side.heads; head++) {
            const S rstd = tame(rstds[head]);
            V sum[2] = {};
            const auto take = [&](int64_t j, auto v, auto m) {
              const auto xhat = load(x + j, m) * rstd, gw = v * load(weight + j, m);
              store(dweight + j, fma(v, xhat, load(dweight + j, m)), m);
              store(g + j, gw, m);
              add_product(sum, 0, gw, xhat);
            };
            turn_head<T>(a.R, a.table.interleaved, cos, sin, [&](int64_t j, auto m) { return load(dy + j, m); }, take);
            for_pairs<kPairs, T, 1>(D - a.R, [&](int64_t j, auto m, auto) { take(a.R + j, load(dy + a.R + j, m), m); });
            const S mean = hsum(sum[0] + sum[1]) / S(D);
            const auto give = [&](int64_t j, auto m) {
              store(dx + j, (load(g + j, m) - load(x + j, m) * rstd * mean) * rstd, m);
            };
            if (a.table.interleaved) {
              for_lanes<T, 1>(a.R, [&](int64_t j, auto m, auto) { give(j, m); });
            } else {
              for_pairs<kPairs, T, 1>(a.R / 2, [&](int64_t j, auto m, auto) { give(j, m); });
              for_pairs<kPairs, T, 1>(a.R / 2, [&](int64_t j, auto m, auto) { give(a.R / 2 + j, m); });
            }
            for_pairs<kPairs, T, 1>(D - a.R, [&](int64_t j, auto m, auto) { give(a.R + j, m); });
            x += side.x_stride[2];
            dy += side.dy_stride[2];
            dx += D;
          }
        }
      }
    }
  });
  for (int i = 0; i < 2; i++) {
    S* sums = weights[i];
    memset(sums, 0, size_t(D) * sizeof(S));
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int64_t j = 0; j < D; j++) sums[j] += partial[(chunk * 2 + i) * D + j];
    store_dweight<T>(sums, a, static_cast<S*>(a.sides[i].dweight));
  }
}

}  // namespace

void qk_norm_rope_fwd(const QkNormRope& a) {
  switch (a.dtype) {
    case kFloat32: return fwd<float>(a);
    case kBFloat16: return fwd<bf16>(a);
    case kFloat16: return fwd<f16>(a);
    case kFloat64: return fwd<double>(a);
  }
}

void qk_norm_rope_bwd(const QkNormRope& a) {
  switch (a.dtype) {
    case kFloat32: return bwd<float>(a);
    case kBFloat16: return bwd<bf16>(a);
    case kFloat16: return bwd<f16>(a);
    case kFloat64: return bwd<double>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
