// How attention's work is cut up: heads into waves that fit a budget of memory, rows into blocks and strips.
#pragma once
#include "sequences.h"
#include "tiles.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

// Bytes for the packed keys of a wave of heads. Only the largest single head may need more.
constexpr int64_t kWaveBytes = 64 << 20;

// One KV head of one sequence: where its packed keys are, and the number of its first task in the wave.
struct Job {
  int64_t offset, task;
};

// Waves of consecutive heads (i * Hkv + head) that fit `budget` elements, of which head number j needs size(j).
template <class Size>
inline int64_t wave_end(int64_t begin, int64_t heads, int64_t budget, const Size& size) {
  int64_t end = begin, sum = 0;
  while (end < heads && (end == begin || sum + size(end) <= budget)) sum += size(end++);
  return end;
}
// What the largest wave takes.
template <class Size>
inline int64_t largest_wave(int64_t heads, int64_t budget, const Size& size) {
  int64_t largest = 0;
  for (int64_t begin = 0; begin < heads;) {
    const int64_t end = wave_end(begin, heads, budget, size);
    int64_t sum = 0;
    for (int64_t j = begin; j < end; j++) sum += size(j);
    largest = max64(largest, sum);
    begin = end;
  }
  return largest;
}
// The job of jobs[begin, end) that a task belongs to.
inline int64_t job_of(const Job* jobs, int64_t begin, int64_t end, int64_t task) {
  while (end - begin > 1) {
    const int64_t middle = (begin + end) / 2;
    (jobs[middle].task <= task ? begin : end) = middle;
  }
  return begin;
}

// Rows of a block that go through the register tiles together, and the panels of a block of keys that any of them
// sees: others aren't computed, which is what makes causal attention cost half.
struct Strip {
  int64_t first_panel, end_panel;
};

// The strips of the rows whose spans are given, for the n keys from s on.
template <class S>
inline void cut_strips(const Span* span, int64_t rows, int64_t s, int64_t n, Strip* strip) {
  constexpr int64_t kStep = kPanel<S>;
  for (int64_t row = 0; row < rows; row += kTileRows, strip++) {
    const int64_t first = max64(span[row].first - s, 0);
    const int64_t end = min64(span[min64(row + kTileRows, rows) - 1].end - s, n);
    strip->first_panel = min64(first, n) / kStep;
    strip->end_panel = end > first ? (end + kStep - 1) / kStep : strip->first_panel;
  }
}

// scores = a b for the panels that each strip sees; depth is the head dimension, `panel` the size of a's and scores'.
template <class S>
inline void multiply_seen(const Strip* strip, int64_t rows, int64_t panel, const S* a, const S* b, S* scores, int64_t n,
                          int64_t depth) {
  constexpr int64_t kStep = kPanel<S>;
  for (int64_t p = 0; p * kStep < n; p++)
    for (int64_t row = 0, i = 0; row < rows; row += kTileRows, i++)
      if (strip[i].first_panel <= p && p < strip[i].end_panel)
        tile_of<2, false, false>(min64(kTileRows, rows - row), a + row * kStep, panel, b + p * depth * kStep,
                                 scores + p * panel + row * kStep, depth);
}

// c += scores b for the keys that each strip sees. b begins at the block's first key and has panels of b_panel elements,
// scores and c of `panel`.
template <class S>
inline void add_seen(const Strip* strip, int64_t rows, int64_t panel, const S* scores, const S* b, int64_t b_panel, S* c,
                     int64_t n, int64_t cols) {
  constexpr int64_t kStep = kPanel<S>;
  for (int64_t col = 0; col < cols; col += kStep, b += b_panel, c += panel)
    for (int64_t row = 0, i = 0; row < rows; row += kTileRows, i++) {
      const int64_t first = strip[i].first_panel, depth = min64(strip[i].end_panel * kStep, n) - first * kStep;
      if (depth > 0)
        add_product(min64(kTileRows, rows - row), scores + first * panel + row * kStep, panel, b + first * kStep * kStep,
                    0, c + row * kStep, 0, min64(kStep, cols - col), depth);
    }
}

}  // namespace
}  // namespace PYLLM_ISA
}  // namespace pyllm
