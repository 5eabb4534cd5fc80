// The bindings of rope_cuda.h, rope_append_cuda.h and qk_norm_rope_cuda.h. Conventions are in bind_cuda.cpp.
#include <array>

#include <pybind11/stl.h>

#include "bind_cuda.h"
#include "rope/qk_norm_rope_cuda.h"
#include "rope/rope_append_cuda.h"
#include "rope/rope_cuda.h"

namespace pyllm {
namespace {

using Sizes = std::array<int64_t, 6>;  // B, T, H, Hkv, D, R
using Four = std::array<int64_t, 4>;
using Three = std::array<int64_t, 3>;
using Two = std::array<int64_t, 2>;

template <size_t N>
void set_stride(int64_t (&to)[N], const Checked& check, const char* name, const std::array<int64_t, N>& stride) {
  for (size_t i = 0; i < N; i++) {
    check.size(name, stride[i]);
    to[i] = stride[i];
  }
}

// What all three have in common: sizes, q and k, what becomes of q.
template <class Args>
bool set_sizes(Args& a, const Checked& check, const Sizes& sizes, Address q, Address k, Address q_out, Address cos,
               Address sin, const Three& q_stride, const Three& k_stride, int64_t table_rows, bool interleaved,
               int dtype) {
  const char* const names[] = {"B", "T", "H", "Hkv", "D"};
  int64_t* const to[] = {&a.B, &a.T, &a.H, &a.Hkv, &a.D};
  for (int i = 0; i < 5; i++) {
    check.size(names[i], sizes[i], i < 2 ? INT64_MAX : int64_t(1) << 20);
    *to[i] = sizes[i];
  }
  a.R = sizes[5];
  check.require(a.R >= 0 && a.R <= a.D && a.R % 2 == 0, "R must be even, at least 0 and at most D = ", a.D, ", got ",
                a.R);
  const bool empty = a.B == 0 || a.T == 0 || a.D == 0;
  check.require(empty || table_rows >= 1, "table_rows must be at least 1, got ", table_rows);
  a.q = check.pointer("q", q, empty || a.H == 0);
  a.k = check.pointer("k", k, empty || a.Hkv == 0);
  a.q_out = check.pointer("q_out", q_out, empty || a.H == 0);
  a.cos = check.pointer<float>("cos", cos, empty || a.R == 0);
  a.sin = check.pointer<float>("sin", sin, empty || a.R == 0);
  set_stride(a.q_stride, check, "q_stride", q_stride);
  set_stride(a.k_stride, check, "k_stride", k_stride);
  a.table_rows = table_rows;
  a.interleaved = interleaved;
  a.dtype = check.dtype("dtype", dtype);
  return empty;
}

// Positions, and tables of which a batch may have its own.
template <class Args>
void set_positions(Args& a, const Checked& check, bool empty, Address k_out, Address positions, const Two& cos_stride,
                   const Two& sin_stride) {
  a.k_out = check.pointer("k_out", k_out, empty || a.Hkv == 0);
  a.positions = check.pointer<int64_t>("positions", positions, true);
  check.require(empty || positions != 0 || a.table_rows >= a.T, "table_rows must be at least T = ", a.T,
                " without positions, got ", a.table_rows);
  set_stride(a.cos_stride, check, "cos_stride", cos_stride);
  set_stride(a.sin_stride, check, "sin_stride", sin_stride);
}

}  // namespace

void bind_rope(pybind11::module_& m) {
  // rope(q, k, q_out, k_out, cos, sin, positions_or_0, (B, T, H, Hkv, D, R), q_stride (3), k_stride (3), cos_stride (2),
  //      sin_stride (2), table_rows, interleaved, conjugate, dtype, stream)
  //   q (B, T, H, D), k (B, T, Hkv, D) by strides of batch, token and head; outputs contiguous; cos, sin: rows of R/2
  //   float32, strides of batch and row; positions (B, T) int64 contiguous. conjugate: the inverse, which is the gradient.
  m.def("rope", [](Address q, Address k, Address q_out, Address k_out, Address cos, Address sin, Address positions,
                   Sizes sizes, Three q_stride, Three k_stride, Two cos_stride, Two sin_stride, int64_t table_rows,
                   bool interleaved, bool conjugate, int dtype, Address stream) {
    const Checked check{"rope"};
    Rope a;
    const bool empty = set_sizes(a, check, sizes, q, k, q_out, cos, sin, q_stride, k_stride, table_rows, interleaved,
                                 dtype);
    set_positions(a, check, empty, k_out, positions, cos_stride, sin_stride);
    a.conjugate = conjugate;
    check.succeeded(rope(a, reinterpret_cast<void*>(stream)));
  });
  // qk_norm_rope_fwd(q, k, q_weight, k_weight, q_out, k_out, rstd_q, rstd_k, cos, sin, positions_or_0,
  //                  (B, T, H, Hkv, D, R), q_stride (3), k_stride (3), cos_stride (2), sin_stride (2), table_rows,
  //                  interleaved, eps, offset, dtype, stream)
  //   weights (D) float32; rstd_q (B, T, H) and rstd_k (B, T, Hkv) float32 are written; the rest as in rope.
  m.def("qk_norm_rope_fwd", [](Address q, Address k, Address q_weight, Address k_weight, Address q_out, Address k_out,
                               Address rstd_q, Address rstd_k, Address cos, Address sin, Address positions, Sizes sizes,
                               Three q_stride, Three k_stride, Two cos_stride, Two sin_stride, int64_t table_rows,
                               bool interleaved, float eps, float offset, int dtype, Address stream) {
    const Checked check{"qk_norm_rope_fwd"};
    QkNormRope a;
    const bool empty = set_sizes(a, check, sizes, q, k, q_out, cos, sin, q_stride, k_stride, table_rows, interleaved,
                                 dtype);
    set_positions(a, check, empty, k_out, positions, cos_stride, sin_stride);
    a.q_weight = check.pointer<float>("q_weight", q_weight, empty);
    a.k_weight = check.pointer<float>("k_weight", k_weight, empty);
    a.rstd_q = check.pointer<float>("rstd_q", rstd_q, empty || a.H == 0);
    a.rstd_k = check.pointer<float>("rstd_k", rstd_k, empty || a.Hkv == 0);
    a.eps = eps;
    a.offset = offset;
    check.succeeded(qk_norm_rope_fwd(a, reinterpret_cast<void*>(stream)));
  });
  // qk_norm_rope_bwd(dq, dk, q, k, q_weight, k_weight, q_grad, k_grad, rstd_q, rstd_k, partial, parts, cos, sin,
  //                  positions_or_0, (B, T, H, Hkv, D, R), dq_stride (3), dk_stride (3), q_stride (3), k_stride (3),
  //                  cos_stride (2), sin_stride (2), table_rows, interleaved, offset, dtype, stream)
  //   partial (parts, 2, D) float32 is written: summed over parts, the gradients of q_weight and k_weight.
  m.def("qk_norm_rope_bwd", [](Address dq, Address dk, Address q, Address k, Address q_weight, Address k_weight,
                               Address q_grad, Address k_grad, Address rstd_q, Address rstd_k, Address partial,
                               int64_t parts, Address cos, Address sin, Address positions, Sizes sizes, Three dq_stride,
                               Three dk_stride, Three q_stride, Three k_stride, Two cos_stride, Two sin_stride,
                               int64_t table_rows, bool interleaved, float offset, int dtype, Address stream) {
    const Checked check{"qk_norm_rope_bwd"};
    QkNormRopeBackward b;
    QkNormRope& a = b.forward;
    const bool empty = set_sizes(a, check, sizes, q, k, q_grad, cos, sin, q_stride, k_stride, table_rows, interleaved,
                                 dtype);
    set_positions(a, check, empty, k_grad, positions, cos_stride, sin_stride);
    check.require(a.D <= 1024, "D must be at most 1024, got ", a.D);
    check.size("parts", parts, 65535);
    a.q_weight = check.pointer<float>("q_weight", q_weight, empty);
    a.k_weight = check.pointer<float>("k_weight", k_weight, empty);
    a.rstd_q = check.pointer<float>("rstd_q", rstd_q, empty || a.H == 0);
    a.rstd_k = check.pointer<float>("rstd_k", rstd_k, empty || a.Hkv == 0);
    b.dq = check.pointer("dq", dq, empty || a.H == 0);
    b.dk = check.pointer("dk", dk, empty || a.Hkv == 0);
    b.partial = check.pointer<float>("partial", partial, parts == 0 || a.D == 0);
    b.parts = parts;
    set_stride(b.dq_stride, check, "dq_stride", dq_stride);
    set_stride(b.dk_stride, check, "dk_stride", dk_stride);
    a.offset = offset;
    check.succeeded(qk_norm_rope_bwd(b, reinterpret_cast<void*>(stream)));
  });
  // rope_append(q, k, v, q_out, k_cache, v_cache, cos, sin, lengths, block_table_or_0, (B, T, H, Hkv, D, R), S, blocks,
  //             table_width, table_stride, q_stride (3), k_stride (3), v_stride (3), k_cache_stride (4),
  //             v_cache_stride (4), cos_stride, sin_stride, table_rows, interleaved, dtype, stream)
  //   caches (B, S, Hkv, D), with a block_table (B, table_width) int32 (blocks, S, Hkv, D); lengths (B) int64; cos, sin
  //   (table_rows, R/2) float32.
  m.def("rope_append", [](Address q, Address k, Address v, Address q_out, Address k_cache, Address v_cache, Address cos,
                          Address sin, Address lengths, Address block_table, Sizes sizes, int64_t S, int64_t blocks,
                          int64_t table_width, int64_t table_stride, Three q_stride, Three k_stride, Three v_stride,
                          Four k_cache_stride, Four v_cache_stride, int64_t cos_stride, int64_t sin_stride,
                          int64_t table_rows, bool interleaved, int dtype, Address stream) {
    const Checked check{"rope_append"};
    RopeAppend a;
    const bool empty = set_sizes(a, check, sizes, q, k, q_out, cos, sin, q_stride, k_stride, table_rows, interleaved,
                                 dtype);
    check.size("S", S, kMostColumns);
    check.size("blocks", blocks, INT32_MAX);
    check.size("table_width", table_width, kMostColumns);
    check.size("table_stride", table_stride);
    check.size("cos_stride", cos_stride);
    check.size("sin_stride", sin_stride);
    const bool nowhere = empty || a.Hkv == 0 || S == 0 || blocks == 0;
    a.v = check.pointer("v", v, empty || a.Hkv == 0);
    a.k_cache = check.pointer("k_cache", k_cache, nowhere);
    a.v_cache = check.pointer("v_cache", v_cache, nowhere);
    a.lengths = check.pointer<int64_t>("lengths", lengths, empty);
    a.block_table = check.pointer<int32_t>("block_table", block_table, true);
    a.S = S;
    a.blocks = blocks;
    a.table_width = table_width;
    a.table_stride = table_stride;
    a.cos_stride = cos_stride;
    a.sin_stride = sin_stride;
    set_stride(a.v_stride, check, "v_stride", v_stride);
    set_stride(a.k_cache_stride, check, "k_cache_stride", Three{k_cache_stride[0], k_cache_stride[1], k_cache_stride[2]});
    set_stride(a.v_cache_stride, check, "v_cache_stride", Three{v_cache_stride[0], v_cache_stride[1], v_cache_stride[2]});
    a.k_cache_step = k_cache_stride[3];
    a.v_cache_step = v_cache_stride[3];
    check.succeeded(rope_append(a, reinterpret_cast<void*>(stream)));
  });
}

}  // namespace pyllm
