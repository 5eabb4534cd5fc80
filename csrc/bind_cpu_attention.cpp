// Attention's part of the module pyllm.kernels._cpu. Conventions: bind_cpu.cpp.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "attention/attention_cpu.h"
#include "bind_cpu.h"

namespace pyllm {
namespace {

using Four = std::array<int64_t, 4>;  // strides of (B, T, H, D); packed tensors give 0 for the first

Strides strides(const Four& s) { return {s[0], s[1], s[2], s[3]}; }

AttentionShape shape_of(int64_t B, int64_t T, int64_t S, int64_t H, int64_t Hkv, int64_t D, const Four& q_stride,
                        const Four& k_stride, const Four& v_stride, double scale, double softcap, int64_t left,
                        int64_t right, int dtype) {
  const int64_t sizes[] = {B, T, S, H, Hkv, D};
  const char* names[] = {"B", "T", "S", "H", "Hkv", "D"};
  for (int i = 0; i < 6; i++) check_size(sizes[i], names[i]);
  if (Hkv == 0 || H % Hkv)
    fail("H must be a multiple of Hkv = " + std::to_string(Hkv) + ", got " + std::to_string(H));
  check_dtype(dtype, "dtype");
  AttentionShape a{};
  a.B = B, a.T = T, a.S = S, a.H = H, a.Hkv = Hkv, a.D = D;
  a.q_stride = strides(q_stride), a.k_stride = strides(k_stride), a.v_stride = strides(v_stride);
  a.scale = scale, a.softcap = softcap, a.left = left, a.right = right, a.dtype = dtype;
  return a;
}

// Rows of packed sequences come from the user: what doesn't fit would read foreign memory.
void check_cu_seqlens(const int32_t* cu, int64_t B, int64_t rows, const std::string& name) {
  bool good = cu[0] == 0 && cu[B] <= rows;
  for (int64_t i = 0; i < B; i++) good = good && cu[i] <= cu[i + 1];
  if (good) return;
  std::string list;
  for (int64_t i = 0; i <= B; i++) list += (i ? ", " : "") + std::to_string(cu[i]);
  fail("attention: cu_seqlens_" + name + " must rise from 0 to at most the " + std::to_string(rows) + " rows of " +
       name + ", got [" + list + "]");
}

void set_packed(AttentionShape& a, uintptr_t cu_q, uintptr_t cu_k) {
  if (!cu_q && !cu_k) return;
  a.cu_q = pointer<const int32_t>(cu_q, "cu_seqlens_q", 1);
  a.cu_k = pointer<const int32_t>(cu_k, "cu_seqlens_k", 1);
  check_cu_seqlens(a.cu_q, a.B, a.T, "q");
  check_cu_seqlens(a.cu_k, a.B, a.S, "k");
}

void attention_fwd(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t sinks, uintptr_t out, uintptr_t lse,
                   uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int64_t B, int64_t T, int64_t S, int64_t H,
                   int64_t Hkv, int64_t D, const Four& q_stride, const Four& k_stride, const Four& v_stride,
                   double scale, int64_t left, int64_t right, double softcap, int dtype) {
  AttentionFwd a{shape_of(B, T, S, H, Hkv, D, q_stride, k_stride, v_stride, scale, softcap, left, right, dtype)};
  set_packed(a.shape, cu_seqlens_q, cu_seqlens_k);
  const int64_t batch = cu_seqlens_q ? 1 : B, queries = batch * T * H, keys = batch * S * Hkv;
  a.q = pointer(q, "q", queries * D), a.k = pointer(k, "k", keys * D), a.v = pointer(v, "v", keys * D);
  a.sinks = pointer(sinks, "sinks", 0);
  a.out = pointer(out, "out", queries * D), a.lse = pointer(lse, "lse", queries);
  py::gil_scoped_release no_gil;
  expect_output(a.out, queries * D * bytes_of(dtype));
  PYLLM_CALL_CPU(isa, attention_fwd, a);
}

void attention_bwd(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t dout, uintptr_t lse, uintptr_t dlse,
                   uintptr_t sinks, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t delta, uintptr_t dsinks,
                   uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k, int64_t B, int64_t T, int64_t S, int64_t H,
                   int64_t Hkv, int64_t D, const Four& q_stride, const Four& k_stride, const Four& v_stride,
                   const Four& out_stride, const Four& dout_stride, double scale, int64_t left, int64_t right,
                   double softcap, int dtype) {
  AttentionBwd a{shape_of(B, T, S, H, Hkv, D, q_stride, k_stride, v_stride, scale, softcap, left, right, dtype)};
  set_packed(a.shape, cu_seqlens_q, cu_seqlens_k);
  const int64_t batch = cu_seqlens_q ? 1 : B, queries = batch * T * H, keys = batch * S * Hkv;
  a.q = pointer(q, "q", queries * D), a.k = pointer(k, "k", keys * D), a.v = pointer(v, "v", keys * D);
  a.out = pointer(out, "out", queries * D), a.dout = pointer(dout, "dout", queries * D);
  a.out_stride = strides(out_stride), a.dout_stride = strides(dout_stride);
  a.lse = pointer(lse, "lse", queries), a.dlse = pointer(dlse, "dlse", 0);
  a.sinks = pointer(sinks, "sinks", 0);
  a.dq = pointer(dq, "dq", queries * D), a.dk = pointer(dk, "dk", keys * D), a.dv = pointer(dv, "dv", keys * D);
  a.delta = pointer(delta, "delta", sinks ? queries : 0), a.dsinks = pointer(dsinks, "dsinks", sinks ? H : 0);
  py::gil_scoped_release no_gil;
  expect_output(a.dq, queries * D * bytes_of(dtype));
  expect_output(a.dk, keys * D * bytes_of(dtype));
  expect_output(a.dv, keys * D * bytes_of(dtype));
  PYLLM_CALL_CPU(isa, attention_bwd, a);
}

// lengths: (B) int64, or int32 where `narrow`. Paged, with table_width >= 0: table (B, table_width) int32 has the block
// numbers, rows table_stride apart, and k and v have S keys in each of `blocks` blocks.
void attention_decode(uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t out, uintptr_t lengths, bool narrow,
                      uintptr_t table, int64_t table_width, int64_t table_stride, int64_t blocks, int64_t B, int64_t T,
                      int64_t S, int64_t H, int64_t Hkv, int64_t D, const Four& q_stride, const Four& k_stride,
                      const Four& v_stride, double scale, int64_t left, double softcap, int dtype) {
  AttentionFwd a{shape_of(B, T, S, H, Hkv, D, q_stride, k_stride, v_stride, scale, softcap, left, 0, dtype)};
  check_size(blocks, "blocks");
  const bool paged = table_width >= 0;
  const int64_t queries = B * T * H, keys = (paged ? blocks : B) * S * Hkv;
  a.q = pointer(q, "q", queries * D), a.out = pointer(out, "out", queries * D);
  a.k = pointer(k_cache, "k_cache", keys * D), a.v = pointer(v_cache, "v_cache", keys * D);

  std::vector<int64_t> valid(static_cast<size_t>(B));
  const void* given = pointer(lengths, "lengths", B);
  const int64_t capacity = paged ? table_width * S : S;
  int64_t longest = 0;
  for (int64_t i = 0; i < B; i++) {
    valid[i] = narrow ? static_cast<const int32_t*>(given)[i] : static_cast<const int64_t*>(given)[i];
    valid[i] = valid[i] < 0 ? 0 : valid[i];
    longest = valid[i] > longest ? valid[i] : longest;
  }
  if (longest > capacity)
    fail("attention_decode: cache_seqlens must be at most the cache's " + std::to_string(capacity) + " keys, got " +
         std::to_string(longest));
  a.shape.lengths = valid.data();
  if (paged && longest > 0) {
    if (S == 0) fail("S, the keys of a block, must not be 0");
    a.shape.table = pointer<const int32_t>(table, "table", B * table_width);
    a.shape.table_stride = table_stride;
    a.shape.block_size = S;
    for (int64_t i = 0; i < B; i++)
      for (int64_t j = 0; j * S < valid[i]; j++) {
        const int32_t block = a.shape.table[i * table_stride + j];
        if (block < 0 || block >= blocks)
          fail("attention_decode: block_table must name blocks in [0, " + std::to_string(blocks) +
               ") as far as cache_seqlens reaches, got " + std::to_string(block));
      }
  }
  py::gil_scoped_release no_gil;
  PYLLM_CALL_CPU(isa, attention_fwd, a);
}

}  // namespace

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_fwd", &attention_fwd, arg("q"), arg("k"), arg("v"), arg("sinks"), arg("out"), arg("lse"),
        arg("cu_seqlens_q"), arg("cu_seqlens_k"), arg("B"), arg("T"), arg("S"), arg("H"), arg("Hkv"), arg("D"),
        arg("q_stride"), arg("k_stride"), arg("v_stride"), arg("scale"), arg("left"), arg("right"), arg("softcap"),
        arg("dtype"));
  m.def("attention_bwd", &attention_bwd, arg("q"), arg("k"), arg("v"), arg("out"), arg("dout"), arg("lse"), arg("dlse"),
        arg("sinks"), arg("dq"), arg("dk"), arg("dv"), arg("delta"), arg("dsinks"), arg("cu_seqlens_q"),
        arg("cu_seqlens_k"), arg("B"), arg("T"), arg("S"), arg("H"), arg("Hkv"), arg("D"), arg("q_stride"),
        arg("k_stride"), arg("v_stride"), arg("out_stride"), arg("dout_stride"), arg("scale"), arg("left"),
        arg("right"), arg("softcap"), arg("dtype"));
  m.def("attention_decode", &attention_decode, arg("q"), arg("k_cache"), arg("v_cache"), arg("out"), arg("lengths"),
        arg("narrow"), arg("table"), arg("table_width"), arg("table_stride"), arg("blocks"), arg("B"), arg("T"),
        arg("S"), arg("H"), arg("Hkv"), arg("D"), arg("q_stride"), arg("k_stride"), arg("v_stride"), arg("scale"),
        arg("left"), arg("softcap"), arg("dtype"));
}

}  // namespace pyllm
