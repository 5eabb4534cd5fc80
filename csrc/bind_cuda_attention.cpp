// The bindings of attention_cuda.h. Conventions are in bind_cuda.cpp.
#include <pybind11/stl.h>

#include <array>

#include "attention/attention_cuda.h"
#include "bind_cuda.h"

namespace pyllm {
namespace {

using Sizes = std::array<int64_t, 6>;  // B, T, S, H, Hkv, D
using Three = std::array<int64_t, 3>;  // strides of batch, row and head; packed tensors give 0 for the first

constexpr int64_t kMostHeadDim = 256;

AttentionStride stride_of(const Checked& check, const char* name, const Three& stride) {
  for (int64_t s : stride) check.size(name, s);
  return {stride[0], stride[1], stride[2]};
}

// Sizes and options; what all three have in common.
template <class Args>
void set_sizes(Args& a, const Checked& check, const Sizes& sizes, int64_t left, float scale, float softcap, int dtype) {
  const char* const names[] = {"B", "T", "S", "H", "Hkv"};
  int64_t* const to[] = {&a.B, &a.T, &a.S, &a.H, &a.Hkv};
  for (int i = 0; i < 5; i++) {
    check.size(names[i], sizes[i], i == 1 || i == 2 ? kMostColumns : int64_t(1) << 20);
    *to[i] = sizes[i];
  }
  check.size("D", sizes[5], kMostHeadDim);
  a.D = sizes[5];
  check.require(a.Hkv >= 1 && a.H % a.Hkv == 0, "H must be a multiple of Hkv = ", a.Hkv, ", got ", a.H);
  check.require(left >= -1, "left must be -1 (no bound) or more, got ", left);
  check.require(softcap >= 0, "softcap must not be negative, got ", softcap);
  a.left = left;
  a.scale = scale;
  a.softcap = softcap;
  a.dtype = check.dtype("dtype", dtype);
}

// Inputs of forward and backward.
void set_inputs(Attention& a, const Checked& check, Address q, Address k, Address v, Address sinks, Address out,
                Address lse, Address cu_q, Address cu_k, const Three& q_stride, const Three& k_stride,
                const Three& v_stride, int64_t right) {
  check.require((cu_q == 0) == (cu_k == 0), "cu_seqlens_q and cu_seqlens_k must both be given, or neither");
  check.require(right >= -1, "right must be -1 (no bound) or more, got ", right);
  const bool packed = cu_q != 0, no_queries = (a.B == 0 && !packed) || a.T == 0 || a.H == 0 || a.D == 0;
  const bool no_keys = (a.B == 0 && !packed) || a.S == 0 || a.D == 0;
  a.q = check.pointer("q", q, no_queries);
  a.k = check.pointer("k", k, no_keys);
  a.v = check.pointer("v", v, no_keys);
  a.sinks = check.pointer<float>("sinks", sinks, true);
  a.out = check.pointer("out", out, no_queries);
  a.lse = check.pointer<float>("lse", lse, no_queries);
  a.cu_q = check.pointer<int32_t>("cu_seqlens_q", cu_q, true);
  a.cu_k = check.pointer<int32_t>("cu_seqlens_k", cu_k, true);
  a.q_stride = stride_of(check, "q_stride", q_stride);
  a.k_stride = stride_of(check, "k_stride", k_stride);
  a.v_stride = stride_of(check, "v_stride", v_stride);
  a.right = right;
}

}  // namespace

void bind_attention(pybind11::module_& m) {
  // attention_fwd(q, k, v, sinks_or_0, out, lse, cu_seqlens_q_or_0, cu_seqlens_k_or_0, (B, T, S, H, Hkv, D), q_stride (3),
  //               k_stride (3), v_stride (3), scale, left, right, softcap, dtype, hopper, stream)
  //   q (B, T, H, D), k, v (B, S, Hkv, D) by strides of batch, row and head; sinks (H) float32; out as q, lse (B, H, T)
  //   float32. Packed, with cu_seqlens (B + 1) int32: q (T, H, D), k, v (S, Hkv, D), batch strides 0, lse (H, T).
  //   hopper: by the kernel for compute capability 9.0, of 16-bit tensors that TMA can read.
  m.def("attention_fwd", [](Address q, Address k, Address v, Address sinks, Address out, Address lse, Address cu_q,
                            Address cu_k, Sizes sizes, Three q_stride, Three k_stride, Three v_stride, float scale,
                            int64_t left, int64_t right, float softcap, int dtype, bool hopper, Address stream) {
    const Checked check{"attention_fwd"};
    Attention a = {};
    set_sizes(a, check, sizes, left, scale, softcap, dtype);
    set_inputs(a, check, q, k, v, sinks, out, lse, cu_q, cu_k, q_stride, k_stride, v_stride, right);
    a.hopper = hopper;
    check.require(!hopper || has_hopper(), "hopper: this build has no code for it, PYLLM_CUDA_ARCHS lacked 90");
    const char* const refusal = hopper && a.q != nullptr ? hopper_refuses(a) : nullptr;
    check.require(refusal == nullptr, "hopper: ", refusal ? refusal : "");
    check.succeeded(attention_fwd(a, reinterpret_cast<void*>(stream)));
  });
  // attention_bwd(q, k, v, out, dout, lse, dlse_or_0, delta, dq, dk, dv, cu_seqlens_q_or_0, cu_seqlens_k_or_0,
  //               (B, T, S, H, Hkv, D), q_stride (3), k_stride (3), v_stride (3), out_stride (3), dout_stride (3), scale,
  //               left, right, softcap, dtype, stream)
  //   delta, as lse, is written: sum(out * dout) - dlse of every query and head.
  m.def("attention_bwd", [](Address q, Address k, Address v, Address out, Address dout, Address lse, Address dlse,
                            Address delta, Address dq, Address dk, Address dv, Address cu_q, Address cu_k, Sizes sizes,
                            Three q_stride, Three k_stride, Three v_stride, Three out_stride, Three dout_stride,
                            float scale, int64_t left, int64_t right, float softcap, int dtype, Address stream) {
    const Checked check{"attention_bwd"};
    AttentionBackward b = {};
    Attention& a = b.forward;
    set_sizes(a, check, sizes, left, scale, softcap, dtype);
    set_inputs(a, check, q, k, v, 0, out, lse, cu_q, cu_k, q_stride, k_stride, v_stride, right);
    const bool no_queries = a.q == nullptr, no_keys = a.k == nullptr;
    b.dout = check.pointer("dout", dout, no_queries);
    b.dlse = check.pointer<float>("dlse", dlse, true);
    b.delta = check.pointer<float>("delta", delta, no_queries);
    b.dq = check.pointer("dq", dq, no_queries);
    b.dk = check.pointer("dk", dk, no_keys);
    b.dv = check.pointer("dv", dv, no_keys);
    b.out_stride = stride_of(check, "out_stride", out_stride);
    b.dout_stride = stride_of(check, "dout_stride", dout_stride);
    check.succeeded(attention_bwd(b, reinterpret_cast<void*>(stream)));
  });
  // attention_decode(q, k_cache, v_cache, out, lengths, lengths_are_32_bits, block_table_or_0, table_width, table_stride,
  //                  blocks, part_or_0, part_lse_or_0, splits, (B, T, S, H, Hkv, D), q_stride (3), k_stride (3),
  //                  v_stride (3), scale, left, softcap, dtype, stream)
  //   caches (B, S, Hkv, D), with a block_table (B, table_width) int32 (blocks, S, Hkv, D); part (splits, B, T, H, D) and
  //   part_lse (splits, B, T, H) float32 where splits > 1. The same bits for the same `splits`.
  m.def("attention_decode", [](Address q, Address k, Address v, Address out, Address lengths, bool narrow,
                               Address block_table, int64_t table_width, int64_t table_stride, int64_t blocks,
                               Address part, Address part_lse, int64_t splits, Sizes sizes, Three q_stride,
                               Three k_stride, Three v_stride, float scale, int64_t left, float softcap, int dtype,
                               Address stream) {
    const Checked check{"attention_decode"};
    AttentionDecode a = {};
    set_sizes(a, check, sizes, left, scale, softcap, dtype);
    check.size("table_width", table_width, kMostColumns);
    check.size("table_stride", table_stride);
    check.size("blocks", blocks, INT32_MAX);
    check.require(splits >= 1 && splits <= 65535, "splits must be between 1 and 65535, got ", splits);
    const bool paged = table_width > 0 && block_table != 0;
    check.require(!paged || a.S >= 1, "S must be at least 1 with a block_table, got ", a.S);
    check.require(!paged || table_width <= kMostColumns / a.S, "table_width * S must be at most ", kMostColumns);
    const bool empty = a.B == 0 || a.T == 0 || a.H == 0 || a.D == 0, no_keys = empty || a.S == 0 || blocks == 0;
    a.q = check.pointer("q", q, empty);
    a.k = check.pointer("k_cache", k, no_keys);
    a.v = check.pointer("v_cache", v, no_keys);
    a.out = check.pointer("out", out, empty);
    a.lengths = check.pointer("lengths", lengths, empty);
    a.block_table = check.pointer<int32_t>("block_table", block_table, true);
    a.part = check.pointer<float>("part", part, empty || splits == 1);
    a.part_lse = check.pointer<float>("part_lse", part_lse, empty || splits == 1);
    a.blocks = blocks;
    a.table_width = table_width;
    a.table_stride = table_stride;
    a.splits = splits;
    a.q_stride = stride_of(check, "q_stride", q_stride);
    a.k_stride = stride_of(check, "k_stride", k_stride);
    a.v_stride = stride_of(check, "v_stride", v_stride);
    a.lengths_are_32_bits = narrow;
    check.succeeded(attention_decode(a, reinterpret_cast<void*>(stream)));
  });
  m.def("has_hopper", &has_hopper);
  m.def("attention_decode_splits", [](int64_t B, int64_t T, int64_t keys, int64_t H, int64_t Hkv, int64_t sms) {
    const Checked check{"attention_decode_splits"};
    check.require(Hkv >= 1 && H % Hkv == 0, "H must be a multiple of Hkv = ", Hkv, ", got ", H);
    return attention_decode_splits(B, T, keys, H, Hkv, sms);
  });
}

}  // namespace pyllm
