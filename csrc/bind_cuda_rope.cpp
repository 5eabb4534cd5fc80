// The bindings of rope_cuda.h. Conventions are in bind_cuda.cpp.
#include <array>

#include <pybind11/stl.h>

#include "bind_cuda.h"
#include "rope/rope_cuda.h"

namespace pyllm {

// rope(q, k, q_out, k_out, cos, sin, positions_or_0, B, T, H, Hkv, D, R, q_stride (3), k_stride (3), cos_stride (2),
//      sin_stride (2), table_rows, interleaved, conjugate, dtype, stream)
//   q (B, T, H, D), k (B, T, Hkv, D) by strides of batch, token and head; outputs contiguous; cos, sin: rows of R/2
//   float32, strides of batch and row; positions (B, T) int64 contiguous. conjugate: the inverse, which is the gradient.
void bind_rope(pybind11::module_& m) {
  m.def("rope", [](Address q, Address k, Address q_out, Address k_out, Address cos, Address sin, Address positions,
                   int64_t B, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t R, std::array<int64_t, 3> q_stride,
                   std::array<int64_t, 3> k_stride, std::array<int64_t, 2> cos_stride,
                   std::array<int64_t, 2> sin_stride, int64_t table_rows, bool interleaved, bool conjugate, int dtype,
                   Address stream) {
    const Checked check{"rope"};
    check.size("B", B);
    check.size("T", T);
    check.size("H", H, 1 << 20);
    check.size("Hkv", Hkv, 1 << 20);
    check.size("D", D, 1 << 20);
    check.require(R >= 0 && R <= D && R % 2 == 0, "R must be even, at least 0 and at most D = ", D, ", got ", R);
    for (int64_t stride : q_stride) check.size("q_stride", stride);
    for (int64_t stride : k_stride) check.size("k_stride", stride);
    const bool empty = B == 0 || T == 0 || D == 0;
    Rope args;
    args.q = check.pointer("q", q, empty || H == 0);
    args.k = check.pointer("k", k, empty || Hkv == 0);
    args.q_out = check.pointer("q_out", q_out, empty || H == 0);
    args.k_out = check.pointer("k_out", k_out, empty || Hkv == 0);
    args.cos = check.pointer<float>("cos", cos, empty || R == 0);
    args.sin = check.pointer<float>("sin", sin, empty || R == 0);
    args.positions = check.pointer<int64_t>("positions", positions, true);
    check.require(empty || table_rows >= 1, "table_rows must be at least 1, got ", table_rows);
    check.require(empty || positions != 0 || table_rows >= T, "table_rows must be at least T = ", T,
                  " without positions, got ", table_rows);
    args.B = B;
    args.T = T;
    args.H = H;
    args.Hkv = Hkv;
    args.D = D;
    args.R = R;
    args.table_rows = table_rows;
    for (int i = 0; i < 3; i++) {
      args.q_stride[i] = q_stride[i];
      args.k_stride[i] = k_stride[i];
    }
    for (int i = 0; i < 2; i++) {
      args.cos_stride[i] = cos_stride[i];
      args.sin_stride[i] = sin_stride[i];
    }
    args.interleaved = interleaved;
    args.conjugate = conjugate;
    args.dtype = check.dtype("dtype", dtype);
    check.succeeded(rope(args, reinterpret_cast<void*>(stream)));
  });
}

}  // namespace pyllm
