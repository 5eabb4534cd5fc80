// Matrix products with float32 sums for operands in half precision, on CPUs that have no instructions for them.
//
// Both operands are packed, a piece at a time, into float32 in the order in which they are read, and multiplied as any
// float32 matrix product is (Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"):
//
//   for columns of b by kNC, for k by kKC:   pack b  (kKC x kNC, in the second- or third-level cache)
//     for rows of a by kMC:                  pack a  (kMC x kKC, in the second-level cache)
//       for strips of b and strips of a:     a tile of kMR x kNR of c in registers, over all of the piece's k
//
// Every thread has a rectangle of c to itself and packs for itself. An element of c is the sum over k in order,
// interrupted at fixed places: the same bits for any number of threads.
#include "linear_cpu.h"

#include "pack.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// As many sums as registers hold, besides two vectors of b and an element of a.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMR = 12;
#else
constexpr int kMR = 6;
#endif
constexpr int kNR = 2 * kFloatLanes;
constexpr int64_t kKC = 512, kMC = 144, kNC = 1024;
constexpr int64_t kStageRows = 8 * kMC;  // of c in float32 at a time, where c is in half precision

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline Vec broadcast(float v) { return v - Vec{}; }  // minus 0 changes nothing, which compilers know; plus 0 does

// c (+)= a b for kRows x kNR elements of c, from strips of a and b.
template <int kRows>
inline void tile(const float* a, const float* b, int64_t K, float* c, int64_t c_row, bool add) {
  Vec left[kRows], right[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) left[r] = right[r] = Vec{};
  for (int64_t k = 0; k < K; k++, a += kMR, b += kNR) {
    const Vec b0 = load(b, Full{}), b1 = load(b + kFloatLanes, Full{});
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Vec x = broadcast(a[r]);
      left[r] = fma(x, b0, left[r]);
      right[r] = fma(x, b1, right[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
    float* to = c + r * c_row;
    if (add) {
      left[r] += load(to, Full{});
      right[r] += load(to + kFloatLanes, Full{});
    }
    store(to, left[r], Full{});
    store(to + kFloatLanes, right[r], Full{});
  }
}

// The first `rows` of a strip: fewer take less time.
inline void tile_of(int64_t rows, const float* a, const float* b, int64_t K, float* c, int64_t c_row, bool add) {
  if (rows == kMR) return tile<kMR>(a, b, K, c, c_row, add);
  if (kMR > 6 && rows > 6) return tile<kMR>(a, b, K, c, c_row, add);
  if (rows > 4) return tile<6>(a, b, K, c, c_row, add);
  if (rows > 2) return tile<4>(a, b, K, c, c_row, add);
  if (rows == 2) return tile<2>(a, b, K, c, c_row, add);
  tile<1>(a, b, K, c, c_row, add);
}

// c (+)= packed a (M x K) times packed b (K x N)
void multiply(const float* a, const float* b, int64_t M, int64_t N, int64_t K, float* c, int64_t c_row, bool add) {
  alignas(64) float edge[kMR * kNR];
  for (int64_t n = 0; n < N; n += kNR)
    for (int64_t m = 0; m < M; m += kMR) {
      const int64_t rows = min64(kMR, M - m), cols = min64(kNR, N - n);
      float* to = c + m * c_row + n;
      const bool whole = rows == kMR && cols == kNR;
      if (whole) {
        tile<kMR>(a + m * K, b + n * K, K, to, c_row, add);
        continue;
      }
      tile_of(rows, a + m * K, b + n * K, K, edge, kNR, false);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < cols; j++) to[r * c_row + j] = edge[r * kNR + j] + (add ? to[r * c_row + j] : 0.f);
    }
}

// c = staged + bias, rounded
template <class T>
void write(const float* staged, int64_t stage_row, const float* bias, int64_t M, int64_t N, T* c, int64_t c_row) {
  for (int64_t m = 0; m < M; m++)
    for_lanes<T, 1>(N, [&](int64_t n, auto part, auto) {
      Vec v = load(staged + m * stage_row + n, part);
      if (bias) v += load(bias + n, part);
      store(c + m * c_row + n, v, part);
    });
}

struct Rectangle {
  int64_t m, M, n, N;
};

// What a thread needs, in floats.
struct Room {
  int64_t a, b, stage;
  Room(const Gemm& g, int64_t M, int64_t N)
      : a(up(min64(kMC, M), kMR) * min64(kKC, g.K) + kPackSlack),
        b(up(min64(kNC, N), kNR) * min64(kKC, g.K) + kPackSlack),
        stage(g.c_dtype == kFloat32 ? 0 : min64(kStageRows, M) * min64(kNC, N)) {
    a = up(a, 16);
    b = up(b, 16);
    stage = up(stage, 16);
  }
  int64_t total() const { return a + b + stage; }
};

// One thread's part of c.
void rectangle(const Gemm& g, Rectangle own, const Room& room, float* memory) {
  float *packed_a = memory, *packed_b = memory + room.a, *stage = packed_b + room.b;
  const bool staged = g.c_dtype != kFloat32;
  const int64_t pieces = (g.K + kKC - 1) / kKC, depth = pieces ? (g.K + pieces - 1) / pieces : 0;
  const int64_t stage_rows = staged ? kStageRows : own.M;
  for (int64_t n = own.n; n < own.n + own.N; n += kNC) {
    const int64_t cols = min64(kNC, own.n + own.N - n);
    for (int64_t top = own.m; top < own.m + own.M; top += stage_rows) {
      const int64_t height = min64(stage_rows, own.m + own.M - top);
      float* c = staged ? stage : static_cast<float*>(g.c) + top * g.c_row + n;
      const int64_t c_row = staged ? cols : g.c_row;
      for (int64_t k = 0; k < g.K; k += depth) {
        const int64_t K = min64(depth, g.K - k);
        pack<kNR>(g.b, g.b_dtype, g.b_col, g.b_row, n, cols, k, K, packed_b);
        for (int64_t m = 0; m < height; m += kMC) {
          const int64_t rows = min64(kMC, height - m);
          pack<kMR>(g.a, g.a_dtype, g.a_row, g.a_col, top + m, rows, k, K, packed_a);
          multiply(packed_a, packed_b, rows, cols, K, c + m * c_row, c_row, k > 0 || g.accumulate);
        }
      }
      const float* bias = g.bias ? static_cast<const float*>(g.bias) + n : nullptr;
      const int64_t at = top * g.c_row + n;
      if (g.c_dtype == kBFloat16) write(stage, c_row, bias, height, cols, static_cast<bf16*>(g.c) + at, g.c_row);
      if (g.c_dtype == kFloat16) write(stage, c_row, bias, height, cols, static_cast<f16*>(g.c) + at, g.c_row);
      if (!staged && bias) write(c, c_row, bias, height, cols, c, c_row);
    }
  }
}

// How c is cut for `threads`: (down, across) with the least work of the busiest thread. A row of c means packing a row
// of a, a column one of b, at about the cost of multiplying with 8 more columns or rows.
void grid(int threads, int64_t M, int64_t N, int64_t& down, int64_t& across) {
  constexpr int64_t kPacking = 8;
  int64_t least = 0;
  for (int64_t d = 1; d <= threads; d++) {
    const int64_t x = threads / d;
    const int64_t rows = up((M + d - 1) / d, kMR), cols = up((N + x - 1) / x, kNR);
    const int64_t work = (rows + kPacking) * (cols + kPacking);
    if (d == 1 || work < least) {
      least = work;
      down = d;
      across = x;
    }
  }
}

// [begin, end) of the i-th of `count` shares of n, cut at multiples of `unit`.
void share(int64_t n, int64_t unit, int64_t count, int64_t i, int64_t& begin, int64_t& size) {
  const int64_t units = (n + unit - 1) / unit, each = units / count, extra = units % count;
  begin = min64(n, (i * each + min64(i, extra)) * unit);
  size = min64(n, ((i + 1) * each + min64(i + 1, extra)) * unit) - begin;
}

template <class T>
void sum_columns(const ColumnSums& a) {
  constexpr int64_t kColumns = 4 * kFloatLanes;
  const T* x = static_cast<const T*>(a.x);
  float* sums = static_cast<float*>(a.sums);
  parallel_for((a.N + kColumns - 1) / kColumns, a.M * a.N, [&](int64_t begin, int64_t end, int) {
    const int64_t first = begin * kColumns;
    for_lanes<T, 1>(min64(end * kColumns, a.N) - first, [&](int64_t n, auto part, auto) {
      Vec even = {}, odd = {};
      int64_t m = 0;
      for (; m + 2 <= a.M; m += 2) {
        even += load(x + m * a.x_row + first + n, part);
        odd += load(x + (m + 1) * a.x_row + first + n, part);
      }
      if (m < a.M) even += load(x + m * a.x_row + first + n, part);
      Vec sum = even + odd;
      if (a.accumulate) sum += load(sums + first + n, part);
      store(sums + first + n, sum, part);
    });
  });
}

}  // namespace

void gemm(const Gemm& g) {
  if (g.M <= 0 || g.N <= 0) return;
  if (g.K <= 0 && !g.accumulate) {  // a sum of nothing
    Gemm zero = g;
    const float none = 0;  // one factor of 0 is as good
    zero.a = zero.b = &none;
    zero.a_dtype = zero.b_dtype = kFloat32;
    zero.a_row = zero.a_col = zero.b_row = zero.b_col = 0;
    zero.K = 1;
    return gemm(zero);
  }
  if (g.K <= 0) return;
  const int64_t strips = up(g.M, kMR) / kMR * (up(g.N, kNR) / kNR);
  const int64_t work = g.M * g.N * g.K / 64;  // as the row kernels count it: 64 products take as long as an element
  const int threads = threads_for(strips, work);
  int64_t down = 1, across = 1;
  grid(threads, g.M, g.N, down, across);
  const Room room(g, up((g.M + down - 1) / down, kMR), up((g.N + across - 1) / across, kNR));
  float* memory = static_cast<float*>(scratch(size_t(down * across * room.total()) * sizeof(float)));
  parallel_for(down * across, work, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; i++) {
      Rectangle own;
      share(g.M, kMR, down, i / across, own.m, own.M);
      share(g.N, kNR, across, i % across, own.n, own.N);
      if (own.M > 0 && own.N > 0) rectangle(g, own, room, memory + i * room.total());
    }
  });
}

void column_sums(const ColumnSums& a) {
  switch (a.dtype) {
    case kFloat32: return sum_columns<float>(a);
    case kBFloat16: return sum_columns<bf16>(a);
    case kFloat16: return sum_columns<f16>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
