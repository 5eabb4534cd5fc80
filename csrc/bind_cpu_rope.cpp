// The rotary kernels' part of the module pyllm.kernels._cpu. Conventions: bind_cpu.cpp.
#include <pybind11/stl.h>

#include <array>

#include "bind_cpu.h"
#include "rope/append_cpu.h"
#include "rope/qk_norm_rope_cpu.h"
#include "rope/rope_cpu.h"

namespace pyllm {
namespace {

using Two = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;

// Sizes that every rotary kernel has, and what must hold between them.
void check_sizes(int64_t B, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t R, int64_t table_rows) {
  const int64_t sizes[] = {B, T, H, Hkv, D, R, table_rows};
  const char* names[] = {"B", "T", "H", "Hkv", "D", "R", "table_rows"};
  for (int i = 0; i < 7; i++) check_size(sizes[i], names[i]);
  if (R > D || R % 2) fail("R must be even and at most D = " + std::to_string(D) + ", got " + std::to_string(R));
}

// Positions come from the user: one outside the table would read foreign memory.
void check_positions(const int64_t* positions, int64_t B, int64_t T, int64_t table_rows) {
  const int64_t tokens = B * T;
  if (!positions && tokens > 0 && T > table_rows)
    fail("T = " + std::to_string(T) + " needs more than the table's " + std::to_string(table_rows) + " rows");
  for (int64_t i = 0; positions && i < tokens; i++)
    if (positions[i] < 0 || positions[i] >= table_rows)
      throw py::index_error("positions must be in [0, " + std::to_string(table_rows) +
                            "), the rows of cos and sin, got " + std::to_string(positions[i]));
}

void rope(uintptr_t q, uintptr_t k, uintptr_t q_out, uintptr_t k_out, uintptr_t cos, uintptr_t sin, uintptr_t positions,
          int64_t B, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t R, Four q_stride, Four k_stride,
          Two cos_stride, Two sin_stride, int64_t table_step, int64_t table_rows, bool interleaved, bool conjugate,
          int dtype) {
  check_sizes(B, T, H, Hkv, D, R, table_rows);
  check_dtype(dtype, "dtype");
  if (!k) Hkv = 0;
  const int64_t tokens = B * T, n_q = tokens * H * D, n_k = tokens * Hkv * D;
  const int64_t n_table = n_q + n_k > 0 ? R : 0;
  Rope a{pointer(q, "q", n_q), pointer(k, "k", n_k), pointer(q_out, "q_out", n_q), pointer(k_out, "k_out", n_k),
         pointer(cos, "cos", n_table), pointer(sin, "sin", n_table), pointer<const int64_t>(positions, "positions", 0),
         B, T, H, Hkv, D, R, {q_stride[0], q_stride[1], q_stride[2]}, {k_stride[0], k_stride[1], k_stride[2]},
         {cos_stride[0], cos_stride[1]}, {sin_stride[0], sin_stride[1]}, table_step, interleaved, conjugate, dtype};
  check_positions(a.positions, B, T, table_rows);
  py::gil_scoped_release no_gil;
  expect_output(a.q_out, n_q * bytes_of(dtype));
  expect_output(a.k_out, n_k * bytes_of(dtype));
  PYLLM_CALL_CPU(isa, rope, a);
}

void qk_norm_rope_fwd(uintptr_t q, uintptr_t k, uintptr_t q_weight, uintptr_t k_weight, uintptr_t q_out,
                      uintptr_t k_out, uintptr_t rstd_q, uintptr_t rstd_k, uintptr_t cos, uintptr_t sin,
                      uintptr_t positions, int64_t B, int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t R,
                      Four q_stride, Four k_stride, Two cos_stride, Two sin_stride, int64_t table_step,
                      int64_t table_rows, bool interleaved, double eps, double offset, int dtype) {
  check_sizes(B, T, H, Hkv, D, R, table_rows);
  check_dtype(dtype, "dtype");
  const int64_t tokens = B * T, n_q = tokens * H * D, n_k = tokens * Hkv * D, n_table = n_q + n_k > 0 ? R : 0;
  QkNormRope a{
      {{pointer(q, "q", n_q), pointer(q_weight, "q_weight", n_q), pointer(q_out, "q_out", n_q),
        pointer(rstd_q, "rstd_q", n_q), nullptr, nullptr, H, {q_stride[0], q_stride[1], q_stride[2]}, {}},
       {pointer(k, "k", n_k), pointer(k_weight, "k_weight", n_k), pointer(k_out, "k_out", n_k),
        pointer(rstd_k, "rstd_k", n_k), nullptr, nullptr, Hkv, {k_stride[0], k_stride[1], k_stride[2]}, {}}},
      {pointer(cos, "cos", n_table), pointer(sin, "sin", n_table), pointer<const int64_t>(positions, "positions", 0),
       {cos_stride[0], cos_stride[1]}, {sin_stride[0], sin_stride[1]}, table_step, interleaved},
      B, T, D, R, eps, offset, dtype};
  check_positions(a.table.positions, B, T, table_rows);
  py::gil_scoped_release no_gil;
  expect_output(a.sides[0].y, n_q * bytes_of(dtype));
  expect_output(a.sides[1].y, n_k * bytes_of(dtype));
  PYLLM_CALL_CPU(isa, qk_norm_rope_fwd, a);
}

void qk_norm_rope_bwd(uintptr_t dq, uintptr_t dk, uintptr_t q, uintptr_t k, uintptr_t q_weight, uintptr_t k_weight,
                      uintptr_t rstd_q, uintptr_t rstd_k, uintptr_t cos, uintptr_t sin, uintptr_t positions,
                      uintptr_t q_grad, uintptr_t k_grad, uintptr_t dq_weight, uintptr_t dk_weight, int64_t B,
                      int64_t T, int64_t H, int64_t Hkv, int64_t D, int64_t R, Four dq_stride, Four dk_stride,
                      Four q_stride, Four k_stride, Two cos_stride, Two sin_stride, int64_t table_step,
                      int64_t table_rows, bool interleaved, double offset, int dtype) {
  check_sizes(B, T, H, Hkv, D, R, table_rows);
  check_dtype(dtype, "dtype");
  const int64_t tokens = B * T, n_q = tokens * H * D, n_k = tokens * Hkv * D, n_table = n_q + n_k > 0 ? R : 0;
  QkNormRope a{
      {{pointer(q, "q", n_q), pointer(q_weight, "q_weight", n_q), pointer(q_grad, "q_grad", n_q),
        pointer(rstd_q, "rstd_q", n_q), pointer(dq, "dq", n_q), pointer(dq_weight, "dq_weight", D), H,
        {q_stride[0], q_stride[1], q_stride[2]}, {dq_stride[0], dq_stride[1], dq_stride[2]}},
       {pointer(k, "k", n_k), pointer(k_weight, "k_weight", n_k), pointer(k_grad, "k_grad", n_k),
        pointer(rstd_k, "rstd_k", n_k), pointer(dk, "dk", n_k), pointer(dk_weight, "dk_weight", D), Hkv,
        {k_stride[0], k_stride[1], k_stride[2]}, {dk_stride[0], dk_stride[1], dk_stride[2]}}},
      {pointer(cos, "cos", n_table), pointer(sin, "sin", n_table), pointer<const int64_t>(positions, "positions", 0),
       {cos_stride[0], cos_stride[1]}, {sin_stride[0], sin_stride[1]}, table_step, interleaved},
      B, T, D, R, 0.0, offset, dtype};
  check_positions(a.table.positions, B, T, table_rows);
  py::gil_scoped_release no_gil;
  expect_output(a.sides[0].y, n_q * bytes_of(dtype));
  expect_output(a.sides[1].y, n_k * bytes_of(dtype));
  PYLLM_CALL_CPU(isa, qk_norm_rope_bwd, a);
}

// Lengths and blocks come from the user, too: a place outside the cache would be written.
void check_lengths(const RopeAppend& a, int64_t n_blocks, int64_t columns, int64_t table_rows) {
  const int64_t capacity = a.blocks ? columns * a.places : a.places;
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t length = a.lengths[b];
    if (length > capacity || length > table_rows)
      fail("rope_append_kv: cache_seqlens must be at most " +
           (length > capacity ? "the cache's " + std::to_string(capacity) + " places"
                              : "the " + std::to_string(table_rows) + " rows of cos and sin") +
           ", new tokens counted, got " + std::to_string(length));
    for (int64_t p = length > a.T ? length - a.T : 0; a.blocks && p < length; p++) {
      const int64_t block = a.blocks[b * a.block_stride + p / a.places];
      if (block < 0 || block >= n_blocks)
        fail("rope_append_kv: block_table must name blocks in [0, " + std::to_string(n_blocks) +
             ") where new tokens go, got " + std::to_string(block));
    }
  }
}

void rope_append(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t q_out, uintptr_t k_cache, uintptr_t v_cache,
                 uintptr_t cos, uintptr_t sin, uintptr_t lengths, uintptr_t blocks, int64_t B, int64_t T, int64_t H,
                 int64_t Hkv, int64_t D, int64_t R, Four q_stride, Four k_stride, Four v_stride, Four cache_shape,
                 Four k_cache_stride, Four v_cache_stride, Two cos_stride, Two sin_stride, int64_t table_rows,
                 int64_t columns, int64_t block_stride, bool interleaved, int dtype) {
  check_sizes(B, T, H, Hkv, D, R, table_rows);
  check_dtype(dtype, "dtype");
  const int64_t tokens = B * T, n_q = tokens * H * D, n_k = tokens * Hkv * D, n_table = n_q + n_k > 0 ? R : 0;
  const int64_t room = n_k > 0 ? cache_shape[0] * cache_shape[1] : 0;
  RopeAppend a{pointer(q, "q", n_q), pointer(k, "k", n_k), pointer(v, "v", n_k), pointer(q_out, "q_out", n_q),
               pointer(k_cache, "k_cache", room), pointer(v_cache, "v_cache", room), pointer(cos, "cos", n_table),
               pointer(sin, "sin", n_table), pointer<const int64_t>(lengths, "lengths", tokens),
               pointer<const int32_t>(blocks, "blocks", 0), B, T, H, Hkv, D, R, cache_shape[1],
               {q_stride[0], q_stride[1], q_stride[2]}, {k_stride[0], k_stride[1], k_stride[2]},
               {v_stride[0], v_stride[1], v_stride[2]}, {}, {}, cos_stride[0], sin_stride[0], cos_stride[1],
               block_stride, interleaved, dtype};
  for (int i = 0; i < 4; i++) {
    a.k_cache_stride[i] = k_cache_stride[i];
    a.v_cache_stride[i] = v_cache_stride[i];
  }
  if (tokens > 0) check_lengths(a, cache_shape[0], columns, table_rows);
  py::gil_scoped_release no_gil;
  PYLLM_CALL_CPU(isa, rope_append, a);
}

}  // namespace

void bind_rope(py::module_& m) {
  using py::arg;
  m.def("rope", &rope, arg("q"), arg("k"), arg("q_out"), arg("k_out"), arg("cos"), arg("sin"), arg("positions"),
        arg("B"), arg("T"), arg("H"), arg("Hkv"), arg("D"), arg("R"), arg("q_stride"), arg("k_stride"),
        arg("cos_stride"), arg("sin_stride"), arg("table_step"), arg("table_rows"), arg("interleaved"),
        arg("conjugate"), arg("dtype"));
  m.def("qk_norm_rope_fwd", &qk_norm_rope_fwd, arg("q"), arg("k"), arg("q_weight"), arg("k_weight"), arg("q_out"),
        arg("k_out"), arg("rstd_q"), arg("rstd_k"), arg("cos"), arg("sin"), arg("positions"), arg("B"), arg("T"),
        arg("H"), arg("Hkv"), arg("D"), arg("R"), arg("q_stride"), arg("k_stride"), arg("cos_stride"),
        arg("sin_stride"), arg("table_step"), arg("table_rows"), arg("interleaved"), arg("eps"), arg("offset"),
        arg("dtype"));
  m.def("qk_norm_rope_bwd", &qk_norm_rope_bwd, arg("dq"), arg("dk"), arg("q"), arg("k"), arg("q_weight"),
        arg("k_weight"), arg("rstd_q"), arg("rstd_k"), arg("cos"), arg("sin"), arg("positions"), arg("q_grad"),
        arg("k_grad"), arg("dq_weight"), arg("dk_weight"), arg("B"), arg("T"), arg("H"), arg("Hkv"), arg("D"),
        arg("R"), arg("dq_stride"), arg("dk_stride"), arg("q_stride"), arg("k_stride"), arg("cos_stride"),
        arg("sin_stride"), arg("table_step"), arg("table_rows"), arg("interleaved"), arg("offset"), arg("dtype"));
  m.def("rope_append", &rope_append, arg("q"), arg("k"), arg("v"), arg("q_out"), arg("k_cache"), arg("v_cache"),
        arg("cos"), arg("sin"), arg("lengths"), arg("blocks"), arg("B"), arg("T"), arg("H"), arg("Hkv"), arg("D"),
        arg("R"), arg("q_stride"), arg("k_stride"), arg("v_stride"), arg("cache_shape"), arg("k_cache_stride"),
        arg("v_cache_stride"), arg("cos_stride"), arg("sin_stride"), arg("table_rows"), arg("columns"),
        arg("block_stride"), arg("interleaved"), arg("dtype"));
}

}  // namespace pyllm
