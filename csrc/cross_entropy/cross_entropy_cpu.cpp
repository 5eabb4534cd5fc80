// Cross-entropy on the CPU. Formulas: kernels/cross_entropy/reference.py; shapes: cross_entropy_cpu.h.
//
// Forward reads every logit once from memory: a row goes by in tiles that stay in the first-level cache while their
// maximum is found and then their exponentials are added (Milakov and Gimelshein 2018, arXiv:1805.02867). The loss is
// taken from (top - x_y) + log(total), not from lse - x_y, which would cancel where logits lie far from zero. Backward
// reads the logits once and writes their gradient. Ignored rows are neither read nor computed.
#include "cross_entropy_cpu.h"

#include "../common/softmax.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

constexpr int64_t kTile = 2048;    // classes that are looked at twice in a row; 8 KiB of float32
constexpr int64_t kShare = 4096;   // classes of a task where a few rows are divided among threads
constexpr int64_t kManyRows = 64;  // from here on a task is a whole row

template <class S>
struct Options {
  const S* weight;
  S softcap, smoothing, z_loss, weight_sum;
  bool smooth, cap;
  int64_t classes, ignore_index;

  explicit Options(const CrossEntropy& a)
      : weight(static_cast<const S*>(a.weight)), softcap(S(a.softcap)), smoothing(S(a.label_smoothing)),
        z_loss(S(a.z_loss)), weight_sum(S(a.weight_sum)), smooth(a.label_smoothing != 0), cap(a.softcap != 0),
        classes(a.cols), ignore_index(a.ignore_index) {}
  S weight_of(int64_t y) const { return weight ? weight[y] : S(1); }
};

// What is kept of the classes of a row that have gone by.
template <class S>
struct Sums {
  S top, total;      // largest logit; sum of exp(x - top)
  S spread, shares;  // sums of w_c (top - x_c) and of w_c, for label smoothing
  S best;            // largest logit before the softcap, and its class
  int64_t best_class;
};

template <class S>
inline S larger(S a, S b) { return b > a ? b : a; }

// A finite number to subtract where every logit so far is -inf.
template <class S>
inline S anchor(S top) { return top == S(-kInfinity) ? S(0) : top; }

// How far a maximum has moved. From -inf it is of no account: all sums were 0, or of terms that stay 0.
template <class S>
inline S rise(S from, S to) { return from == S(-kInfinity) ? S(0) : to - from; }

// A NaN that bf16 pairs can be rounded from (simd.h).
template <class S>
inline S tamed(S v) { return v == v ? v : S(__builtin_nanf("")); }

template <class V>
inline void add_to(V* sum, int index, V v) { sum[index] += v; }
inline void add_to(Vec* sum, int index, Pair v) {
  sum[2 * index] += v.even;
  sum[2 * index + 1] += v.odd;
}
template <class V>
inline void raise(V* top, int index, V v) { top[index] = max(top[index], v); }
inline void raise(Vec* top, int index, Pair v) {
  top[2 * index] = max(top[2 * index], v.even);
  top[2 * index + 1] = max(top[2 * index + 1], v.odd);
}

template <class V, class S>
inline V capped(V x, S softcap) { return softcap * tanh(x / softcap); }
template <class V, class S>
inline S capped_scalar(S x, const Options<S>& o) { return o.cap ? lane(capped(V{} + x, o.softcap)) : x; }

// kPlain: without softcap and label smoothing, the loops that must be fast.
template <class T, bool kPlain>
Sums<ScalarOf<T>> sums_of(const T* x, int64_t begin, int64_t end, const Options<ScalarOf<T>>& o, bool predict) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  constexpr bool kPairs = kPlain && kEvenOdd<T>;
  Sums<S> s{S(-kInfinity), 0, 0, 0, S(-kInfinity), begin};
  V total[4] = {};
  for (int64_t first = begin; first < end; first += kTile) {
    const T* tile = x + first;
    const int64_t n = min64(kTile, end - first);
    V tops[4];
    for (V& t : tops) t = splat<V>(-kInfinity);
    for_pairs<kPairs, T, 4>(n, [&](int64_t i, auto m, auto index) {
      raise(tops, index, keep(load(tile + i, m), m, -kInfinity));
    });
    const S highest = hmax(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
    if (predict && highest > s.best) {
      s.best = highest;
      s.best_class = first;
      while (value(x + s.best_class) != highest) s.best_class++;
    }
    const S before = s.top;
    s.top = larger(s.top, kPlain ? highest : capped_scalar<V>(highest, o));
    const S top = anchor(s.top), up = rise(before, s.top);
    if (up != 0) {
      const S scale = lane(exp_below(V{} - up));
      for (V& t : total) t *= scale;
      s.spread += s.shares * up;
    }
    if constexpr (!kPlain)
      if (o.smooth) {
        V spread = {}, shares = {};
        for_lanes<T, 1>(n, [&](int64_t i, auto m, auto) {
          const V v = load(tile + i, m);
          const V w = o.weight ? load(o.weight + first + i, m) : keep(splat<V>(1.f), m, 0.f);
          spread = fma(w, keep(top - (o.cap ? capped(v, o.softcap) : v), m, 0.f), spread);
          shares += w;
        });
        s.spread += hsum(spread);
        s.shares += hsum(shares);
      }
    for_pairs<kPairs, T, 4>(n, [&](int64_t i, auto m, auto index) {
      // Memory works on the next tile while this one is computed.
      __builtin_prefetch(tile + i + kTile);
      auto v = load(tile + i, m);
      if constexpr (!kPlain)
        if (o.cap) v = each(v, [&](auto u) { return capped(u, o.softcap); });
      add_to(total, index, keep(each(v, [&](auto u) { return exp_below(u - top); }), m, 0.f));
    });
  }
  s.total = hsum((total[0] + total[1]) + (total[2] + total[3]));
  return s;
}

// The sums of a row from those of its pieces a and then b.
template <class V, class S>
Sums<S> joined(const Sums<S>& a, const Sums<S>& b) {
  Sums<S> s = b.best > a.best ? b : a;  // the first of equals
  s.top = larger(a.top, b.top);
  const S up_a = rise(a.top, s.top), up_b = rise(b.top, s.top);
  s.total = a.total * lane(exp_below(V{} - up_a)) + b.total * lane(exp_below(V{} - up_b));
  s.spread = (a.spread + a.shares * up_a) + (b.spread + b.shares * up_b);
  s.shares = a.shares + b.shares;
  return s;
}

template <class T>
void finish(const CrossEntropy& a, const Options<ScalarOf<T>>& o, int64_t row, const T* x,
            const Sums<ScalarOf<T>>& s) {
  using S = ScalarOf<T>;
  const int64_t y = a.target[row];
  const bool kept = y != o.ignore_index;
  const S log_total = s.total == 0 ? S(__builtin_nanf("")) : log(s.total);  // 0: nothing but -inf
  const S lse = anchor(s.top) + log_total;
  S loss = 0;
  if (kept) {
    loss = ((anchor(s.top) - capped_scalar<VecOf<T>>(value(x + y), o)) + log_total) * o.weight_of(y);
    if (o.smooth)
      loss = (1 - o.smoothing) * loss + o.smoothing / S(o.classes) * (s.spread + o.weight_sum * log_total);
    if (o.z_loss != 0) loss += o.z_loss * lse * lse;
  }
  static_cast<S*>(a.loss)[row] = loss;
  static_cast<S*>(a.lse)[row] = kept ? lse : 0;
  if (a.predictions) {
    int64_t best = s.best_class;
    if (s.total != s.total)  // torch's argmax: a NaN is the largest
      for (int64_t c = o.classes - 1; c >= 0; c--)
        if (value(x + c) != value(x + c)) best = c;
    a.predictions[row] = best;
  }
}

template <class T>
const T* row_of(const CrossEntropy& a, int64_t row) { return static_cast<const T*>(a.logits) + row * a.x_stride; }

template <class T, bool kPlain>
void forward_row(const CrossEntropy& a, const Options<ScalarOf<T>>& o, int64_t row) {
  const bool predict = a.predictions != nullptr;
  const bool read = predict || a.target[row] != o.ignore_index;
  finish<T>(a, o, row, row_of<T>(a, row), sums_of<T, kPlain>(row_of<T>(a, row), 0, read ? a.cols : 0, o, predict));
}

// The gradient of the classes [begin, end) of a row.
template <class T, bool kPlain, bool kStream>
void backward_piece(const CrossEntropy& a, const Options<ScalarOf<T>>& o, int64_t row, int64_t begin, int64_t end) {
  using S = ScalarOf<T>;
  using V = VecOf<T>;
  constexpr bool kPairs = kPlain && kEvenOdd<T>;
  const T* x = row_of<T>(a, row);
  T* grad = static_cast<T*>(a.dlogits) + row * a.cols;
  const int64_t y = a.target[row];
  if (y == o.ignore_index) {
    for_lanes<T, 1>(end - begin, [&](int64_t i, auto m, auto) { store_out<kStream>(grad + begin + i, V{}, m); });
    return;
  }
  const S dloss = tamed(static_cast<const S*>(a.dloss)[row * a.dloss_stride]);
  const S lse = tamed(static_cast<const S*>(a.lse)[row]);
  const S at_target = (1 - o.smoothing) * dloss * o.weight_of(y);
  const S everywhere = o.smoothing / S(o.classes) * dloss;
  S share = at_target + everywhere * o.weight_sum;
  if (o.z_loss != 0) share += 2 * o.z_loss * lse * dloss;
  // p share - everywhere w, times the softcap's derivative
  const auto gradient = [&](V v, V w, S minus) {
    if constexpr (kPlain) return exp_below(v - lse) * share - minus;
    V slope = splat<V>(1.f);
    if (o.cap) {
      const V t = tanh(v / o.softcap);
      v = o.softcap * t;
      slope = S(1) - t * t;
    }
    return (exp_below(v - lse) * share - (everywhere * w + minus)) * slope;
  };
  // Read before anything is written: dlogits may be the logits.
  const bool inside = begin <= y && y < end;
  const S of_target = inside ? lane(gradient(V{} + value(x + y), V{} + o.weight_of(y), at_target)) : S(0);
  for_pairs<kPairs, T, 2>(end - begin, [&](int64_t i, auto m, auto) {
    const auto v = load(x + begin + i, m);
    if constexpr (kPlain) {
      store_out<kStream>(grad + begin + i, each(v, [&](auto u) { return exp_below(u - lse) * share; }), m);
    } else {
      const V w = o.weight ? load(o.weight + begin + i, m) : splat<V>(1.f);
      store_out<kStream>(grad + begin + i, gradient(v, w, S(0)), m);
    }
  });
  if (inside) {
    if constexpr (kStream) stream_fence();  // the same line was just written past the cache
    store(grad + y, V{} + of_target, Part{1});
  }
}

template <class T, bool kPlain>
void fwd(const CrossEntropy& a) {
  using S = ScalarOf<T>;
  const Options<S> o(a);
  const int64_t pieces = a.rows < kManyRows ? (a.cols + kShare - 1) / kShare : 1;
  if (pieces <= 1) {
    parallel_for(a.rows, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; row++) forward_row<T, kPlain>(a, o, row);
    });
    return;
  }
  // How rows are divided depends on their number and length alone: the same bits for any number of threads.
  Sums<S>* parts = static_cast<Sums<S>*>(scratch(size_t(a.rows * pieces) * sizeof(Sums<S>)));
  parallel_for(a.rows * pieces, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / pieces, first = i % pieces * kShare;
      const bool read = a.predictions || a.target[row] != o.ignore_index;
      const int64_t last = read ? min64(first + kShare, a.cols) : first;
      parts[i] = sums_of<T, kPlain>(row_of<T>(a, row), first, last, o, a.predictions != nullptr);
    }
  });
  for (int64_t row = 0; row < a.rows; row++) {
    Sums<S> s = parts[row * pieces];
    for (int64_t i = 1; i < pieces; i++) s = joined<VecOf<T>>(s, parts[row * pieces + i]);
    finish<T>(a, o, row, row_of<T>(a, row), s);
  }
}

template <class T, bool kPlain, bool kStream>
void bwd_pieces(const CrossEntropy& a) {
  const Options<ScalarOf<T>> o(a);
  const int64_t share = a.rows < kManyRows ? kShare : a.cols, pieces = (a.cols + share - 1) / share;
  parallel_for(a.rows * pieces, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % pieces * share;
      backward_piece<T, kPlain, kStream>(a, o, i / pieces, first, min64(first + share, a.cols));
    }
    if constexpr (kStream) stream_fence();
  });
}

template <class T, bool kPlain>
void bwd(const CrossEntropy& a) {
  if constexpr (sizeof(T) == 4)
    if (worth_streaming(static_cast<T*>(a.dlogits), a.cols, a.rows * a.cols)) return bwd_pieces<T, kPlain, true>(a);
  bwd_pieces<T, kPlain, false>(a);
}

template <class T, bool kPlain>
void step(const CrossEntropy& a) {
  const Options<ScalarOf<T>> o(a);
  parallel_for(a.rows, a.rows * a.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; row++) {
      forward_row<T, kPlain>(a, o, row);
      backward_piece<T, kPlain, false>(a, o, row, 0, a.cols);
    }
  });
}

bool plain(const CrossEntropy& a) { return a.label_smoothing == 0 && a.softcap == 0; }

}  // namespace

void cross_entropy_fwd(const CrossEntropy& a) {
  switch (a.dtype) {
    case kFloat32: return plain(a) ? fwd<float, true>(a) : fwd<float, false>(a);
    case kBFloat16: return plain(a) ? fwd<bf16, true>(a) : fwd<bf16, false>(a);
    case kFloat16: return plain(a) ? fwd<f16, true>(a) : fwd<f16, false>(a);
    case kFloat64: return fwd<double, false>(a);
  }
}

void cross_entropy_bwd(const CrossEntropy& a) {
  switch (a.dtype) {
    case kFloat32: return plain(a) ? bwd<float, true>(a) : bwd<float, false>(a);
    case kBFloat16: return plain(a) ? bwd<bf16, true>(a) : bwd<bf16, false>(a);
    case kFloat16: return plain(a) ? bwd<f16, true>(a) : bwd<f16, false>(a);
    case kFloat64: return bwd<double, false>(a);
  }
}

// Of the linear form, whose logits are never in half precision.
void cross_entropy_step(const CrossEntropy& a) {
  if (a.dtype == kFloat64) return step<double, false>(a);
  plain(a) ? step<float, true>(a) : step<float, false>(a);
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
