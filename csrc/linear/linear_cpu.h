// Matrix products with float32 sums on the CPU: arguments of the kernels. Sizes and strides are in elements.
#pragma once
#include "../common/cpu.h"

namespace pyllm {

// c = a b (+ bias) or c += a b, in float32 whatever the dtypes of the operands, rounded once to c's.
struct Gemm {
  const void* a;  // (M, K), any strides
  const void* b;  // (K, N), any strides
  const void* bias;  // (N) float32, or null; not with accumulate
  void* c;        // (M, N), rows c_row apart, columns dense; apart from a and b
  int64_t M, N, K, a_row, a_col, b_row, b_col, c_row;
  bool accumulate;  // with a float32 c only
  int a_dtype, b_dtype, c_dtype;  // float32, bfloat16, float16
};

// sums[n] (+)= sum over m of x[m][n], in float32
struct ColumnSums {
  const void* x;  // (M, N), rows x_row apart, columns dense
  void* sums;     // (N) float32
  int64_t M, N, x_row;
  bool accumulate;
  int dtype;
};

PYLLM_DECLARE_CPU(gemm, const Gemm&)
PYLLM_DECLARE_CPU(column_sums, const ColumnSums&)

}  // namespace pyllm
