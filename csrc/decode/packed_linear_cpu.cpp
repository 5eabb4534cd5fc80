// Rows times a packed matrix, for prompts and whatever else goes through a quantised layer outside a decoding step. The
// same arithmetic as in the step (quantized.h), in parallel over outputs.
#include "../common/simd.h"
#include "decode_cpu.h"
#include "quantized.h"

namespace pyllm {
namespace PYLLM_ISA {
namespace {

template <class T>
void linear(const PackedLinear& a) {
  const int64_t padded = packed_columns(a.K), groups = padded / kGroup;
  const size_t q_bytes = size_t(a.rows * padded) * sizeof(int16_t), group_bytes = size_t(a.rows * groups) * 4;
  char* memory = static_cast<char*>(scratch(q_bytes + 2 * group_bytes));
  float* step = reinterpret_cast<float*>(memory);
  int32_t* sum = reinterpret_cast<int32_t*>(memory + group_bytes);
  int16_t* q = reinterpret_cast<int16_t*>(memory + 2 * group_bytes);
  parallel_for(a.rows, a.rows * a.K, [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; m++)
      for (int64_t g = 0; g < groups; g++) {
        float group[kGroup];
        const int64_t n = min64(kGroup, a.K - g * kGroup);
        const T* x = static_cast<const T*>(a.x) + m * a.x_stride + g * kGroup;
        for_lanes<float, 1>(n, [&](int64_t i, auto part, auto) { store(group + i, load(x + i, part), part); });
        quantize_row(group, n, q + m * padded + g * kGroup, step + m * groups + g, sum + m * groups + g);
      }
  });
  const int64_t blocks = (a.N + kBlock - 1) / kBlock;
  parallel_for(blocks, a.rows * a.N * a.K, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kRows = 8;
    float tile[kRows * kBlock];
    for (int64_t block = begin; block < end; block++) {
      const int64_t n = block * kBlock, count = min64(kBlock, a.N - n);
      for (int64_t m = 0; m < a.rows; m += kRows) {
        const int64_t rows = min64(kRows, a.rows - m);
        packed_product(a.w, n, n + kBlock, a.K, rows, q + m * padded, step + m * groups, sum + m * groups, tile, kBlock);
        for (int64_t r = 0; r < rows; r++)
          for_lanes<float, 1>(count, [&](int64_t i, auto part, auto) {
            Vec v = load(tile + r * kBlock + i, part);
            if (a.w.bias) v += load(static_cast<const T*>(a.w.bias) + n + i, part);
            store(static_cast<T*>(a.y) + (m + r) * a.N + n + i, v, part);
          });
      }
    }
  });
}

}  // namespace

void packed_linear(const PackedLinear& a) {
  switch (a.dtype) {
    case kFloat32: return linear<float>(a);
    case kBFloat16: return linear<bf16>(a);
    case kFloat16: return linear<f16>(a);
  }
}

}  // namespace PYLLM_ISA
}  // namespace pyllm
