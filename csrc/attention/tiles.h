// Matrix products in registers, on matrices that lie in panels.
//
// A panel is kPanel<S> columns (two vectors) of a matrix, its rows next to each other in memory:
//
//   panel 0          panel 1             element (row, col) is at
//   row 0: | a b | , row 0: | c d | ...     col / kPanel * panel_size + row * kPanel + col % kPanel
//   row 1: | e f |   row 1: | g h |
//
// Every matrix here is kept so, on whichever side of a product it stands and as its result: the right factor is read a
// row of a panel at a time, and an element of the left one is at a distance from its neighbours that the compiler
// knows. Columns beyond a matrix's last are zeros, up to a full panel. Source: Goto and van de Geijn 2008, "Anatomy of
// high-performance matrix multiplication".
#pragma once
#include "decode_cpu.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

template <class S>
constexpr int kPanel = 2 * Compute<S>::kLanes;

// Rows of a register tile. Two vectors of each are sums; two registers hold the right factor's row, one an element of
// the left: 15 of AVX2's 16 registers, 27 of the 32 that AVX-512 and NEON have.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

// c (+)= a b for a tile of kRows rows and kVectors vectors. The first element of each is given; b and c have panels.
//   a as it is    its rows are the tile's, `depth` its columns, from panel to panel a_panel elements
//   kTransposed   its columns are the tile's rows, `depth` its rows, all in one panel
template <int kRows, int kVectors, bool kTransposed, bool kAdd, class S>
inline __attribute__((always_inline)) void tile(const S* a, int64_t a_panel, const S* b, S* c, int64_t depth) {
  using V = VecOf<S>;
  constexpr int kLanes = Compute<S>::kLanes, kStep = kPanel<S>;
  V sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; x++) sum[r][x] = kAdd ? load(c + r * kStep + x * kLanes, Full{}) : V{};
  const auto step = [&](const S* left, int distance) __attribute__((always_inline)) {
    V right[kVectors];
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; x++) right[x] = load(b + x * kLanes, Full{});
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const V element = all<V>(left[r * distance]);
#pragma GCC unroll 2
      for (int x = 0; x < kVectors; x++) sum[r][x] = fma(element, right[x], sum[r][x]);
    }
    b += kStep;
  };
  if constexpr (kTransposed) {
    for (int64_t k = 0; k < depth; k++) step(a + k * kStep, 1);
  } else {
    for (; depth > 0; depth -= kStep, a += a_panel) {
      const int n = int(min64(depth, kStep));
      for (int k = 0; k < n; k++) step(a + k, kStep);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int x = 0; x < kVectors; x++) store(c + r * kStep + x * kLanes, sum[r][x], Full{});
}

// The same for any number of rows up to kTileRows.
template <int kVectors, bool kTransposed, bool kAdd, class S>
inline void tile_of(int64_t rows, const S* a, int64_t a_panel, const S* b, S* c, int64_t depth) {
  if (rows == kTileRows) return tile<kTileRows, kVectors, kTransposed, kAdd>(a, a_panel, b, c, depth);
  const auto some = [&](auto n) {
    constexpr int kRows = decltype(n)::value;
    tile<kRows, kVectors, kTransposed, kAdd>(a, a_panel, b, c, depth);
    a += kTransposed ? kRows : kRows * kPanel<S>;
    c += kRows * kPanel<S>;
    rows -= kRows;
  };
  if constexpr (kTileRows > 8)
    if (rows >= 8) some(Index<8>{});
  if (rows >= 4) some(Index<4>{});
  if (rows >= 2) some(Index<2>{});
  if (rows >= 1) some(Index<1>{});
}

// Vectors of a panel that have a column below `cols`; col is the panel's first.
template <class S>
inline bool one_vector(int64_t col, int64_t cols) { return cols - col <= Compute<S>::kLanes; }

// c += a b for a strip of rows of a, over the columns that c has.
template <class S>
inline void add_product(int64_t rows, const S* a, int64_t a_panel, const S* b, int64_t b_panel, S* c, int64_t c_panel,
                        int64_t cols, int64_t depth) {
  for (int64_t col = 0; col < cols; col += kPanel<S>, b += b_panel, c += c_panel)
    one_vector<S>(col, cols) ? tile_of<1, false, true>(rows, a, a_panel, b, c, depth)
                             : tile_of<2, false, true>(rows, a, a_panel, b, c, depth);
}
// c += a^T b, of which a is one panel: kPanel rows of c.
template <class S>
inline void add_transposed(const S* a, const S* b, int64_t b_panel, S* c, int64_t c_panel, int64_t cols, int64_t depth) {
  for (int64_t col = 0; col < cols; col += kPanel<S>, b += b_panel, c += c_panel)
    for (int64_t row = 0; row < kPanel<S>; row += kTileRows) {
      const int64_t rows = min64(kTileRows, kPanel<S> - row);
      S* to = c + row * kPanel<S>;
      one_vector<S>(col, cols) ? tile_of<1, true, true>(rows, a + row, 0, b, to, depth)
                               : tile_of<2, true, true>(rows, a + row, 0, b, to, depth);
    }
}

// Elements of a matrix of `rows` rows in panels.
template <class S>
inline int64_t panels_size(int64_t rows, int64_t cols) { return round_up(cols, kPanel<S>) * rows; }

// A row of D elements, `step` apart, times factor, becomes row `row` of a matrix whose panels are `panel` elements.
template <class T, class S>
inline void pack_row(const T* from, int64_t step, int64_t D, S factor, S* to, int64_t panel, int64_t row) {
  constexpr int kStep = kPanel<S>;
  for (int64_t d = 0; d < D; d += kStep)
    copy_row(from + d * step, step, min64(kStep, D - d), factor, to + d / kStep * panel + row * kStep, kStep);
}

// kPanel rows of D elements, rows[i] each, become the columns of one panel; null rows zeros. room: kPanel * D elements.
template <class T, class S>
inline void pack_columns(const T* const* rows, int64_t step, int64_t D, S* to, S* room) {
  constexpr int kStep = kPanel<S>, kLanes = Compute<S>::kLanes;
  const int64_t width = round_up(D, kLanes);
  for (int i = 0; i < kStep; i++) {
    if (rows[i])
      copy_row(rows[i], step, D, S(1), room + i * width, width);
    else
      memset(room + i * width, 0, size_t(width) * sizeof(S));
  }
  for (int64_t d = 0; d < D; d++)
    for (int i = 0; i < kStep; i++) to[d * kStep + i] = room[i * width + d];
}

// The packed keys and values of a head: which forms of them, where.
template <class S>
struct PackedKeys {
  int64_t rows;                                // that each matrix has room for: a multiple of kPanel
  S *k_columns, *v_columns, *k_rows, *v_rows;  // K^T and V^T (D, rows), K and V (rows, D); null: not wanted
};
// Packs the keys of a span. Those before it in its first panel become zeros: their scores are masked, but a probability
// of 0 would not cancel a NaN.
template <class T, class S>
inline void pack_keys(const KeyValues<T>& kv, Span span, int64_t D, const PackedKeys<S>& to, S* room) {
  constexpr int kStep = kPanel<S>;
  const auto rows = [&](const T* row, int64_t step, S* rows_of, int64_t s) {
    const int64_t panel = to.rows * kStep;
    if (row) return pack_row(row, step, D, S(1), rows_of, panel, s);
    for (int64_t d = 0; d < D; d += kStep) memset(rows_of + d / kStep * panel + s * kStep, 0, kStep * sizeof(S));
  };
  for (int64_t s = span.first / kStep * kStep; s < span.end; s += kStep) {
    const T *key[kStep], *value[kStep];
    for (int i = 0; i < kStep; i++) {
      const bool seen = s + i >= span.first && s + i < span.end;
      key[i] = seen ? kv.key(s + i) : nullptr;
      value[i] = seen ? kv.value(s + i) : nullptr;
    }
    if (to.k_columns) pack_columns(key, kv.k_element, D, to.k_columns + s * D, room);
    if (to.v_columns) pack_columns(value, kv.v_element, D, to.v_columns + s * D, room);
    for (int i = 0; i < kStep && s + i < span.end; i++) {
      if (to.k_rows) rows(key[i], kv.k_element, to.k_rows, s + i);
      if (to.v_rows) rows(value[i], kv.v_element, to.v_rows, s + i);
    }
  }
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
