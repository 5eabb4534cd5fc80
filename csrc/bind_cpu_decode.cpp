// Bindings of the decoding step and of packed matrices. The tables behind `layers` and `caches` are int64 tensors that
// kernels/decode/bindings.py writes in the order of csrc/decode/decode_cpu.h.
#include "bind_cpu.h"
#include "decode/decode_cpu.h"

namespace pyllm {

namespace {

constexpr int64_t kLayerNumbers = sizeof(DecodeLayer) / 8, kCacheNumbers = sizeof(DecodeCache) / 8;

Matrix matrix(uintptr_t weight, uintptr_t scale, uintptr_t bias, int64_t kind) {
  if (kind < kFloat32 || kind > kInt4 || kind == kFloat64) fail("kind must be a code from 0 to 5 but 3, got " + std::to_string(kind));
  return {pointer(weight, "weight", 1), pointer(scale, "scale", kind >= kInt8), pointer(bias, "bias", 0), kind};
}

void check_half(int dtype) {
  if (dtype < kFloat32 || dtype > kFloat16)
    fail("dtype must be that of float32, bfloat16 or float16, got code " + std::to_string(dtype));
}

void decode_step(uintptr_t layers, uintptr_t caches, int64_t L, uintptr_t embedding, uintptr_t norm, uintptr_t head,
                 uintptr_t head_scale, int64_t head_kind, uintptr_t ids, uintptr_t cos, uintptr_t sin,
                 int64_t angle_stride, uintptr_t first, uintptr_t ends, uintptr_t logits, int64_t R, int64_t T,
                 int64_t keep, int64_t C, int64_t H, int64_t Hkv, int64_t D, int64_t F, int64_t V, int64_t bytes,
                 float eps, bool ring, int dtype) {
  const int64_t sizes[] = {L, R, T, keep, C, H, Hkv, D, F, V};
  const char* names[] = {"L", "R", "T", "keep", "C", "H", "Hkv", "D", "F", "V"};
  for (int i = 0; i < 10; i++)
    if (sizes[i] < 1) fail(std::string(names[i]) + " must be at least 1, got " + std::to_string(sizes[i]));
  if (keep > T) fail("keep must be at most T = " + std::to_string(T) + ", got " + std::to_string(keep));
  if (H % Hkv || D % 2) fail("H must be a multiple of Hkv and D even");
  check_half(dtype);
  DecodeStep s{pointer<const DecodeLayer>(layers, "layers", 1), pointer<const DecodeCache>(caches, "caches", 1),
               pointer(embedding, "embedding", 1), pointer(norm, "norm", 1), matrix(head, head_scale, 0, head_kind),
               pointer<const int64_t>(ids, "ids", 1), pointer<const float>(cos, "cos", 1),
               pointer<const float>(sin, "sin", 1), angle_stride, pointer<const int32_t>(first, "first", 1),
               pointer<const int32_t>(ends, "ends", 1), pointer<float>(logits, "logits", 1), L, R, T, keep, C, H, Hkv,
               D, F, V, bytes, eps, ring, dtype};
  for (int64_t i = 0; i < R * T; i++)  // an id outside the vocabulary would read foreign memory
    if (s.ids[i] < 0 || s.ids[i] >= V)
      fail("input_ids must be within [0, " + std::to_string(V) + "), got " + std::to_string(s.ids[i]));
  py::gil_scoped_release no_gil;
  PYLLM_CALL_CPU(isa, decode_step, s);
}

void packed_linear(uintptr_t weight, uintptr_t scale, uintptr_t bias, int64_t kind, uintptr_t x, uintptr_t y,
                   int64_t rows, int64_t N, int64_t K, int64_t x_stride, int dtype) {
  check_size(rows, "rows");
  if (N < 1 || K < 1) fail("a packed matrix has at least one row and column");
  if (kind < kInt8) fail("kind must be that of a packed matrix, 4 or 5, got " + std::to_string(kind));
  check_half(dtype);
  PackedLinear a{matrix(weight, scale, bias, kind), pointer(x, "x", rows), pointer(y, "y", rows), rows, N, K, x_stride,
                 dtype};
  py::gil_scoped_release no_gil;
  PYLLM_CALL_CPU(isa, packed_linear, a);
}

}  // namespace

void bind_decode(py::module_& m) {
  using py::arg;
  m.attr("decode_layer_numbers") = kLayerNumbers;
  m.attr("decode_cache_numbers") = kCacheNumbers;
  m.def("decode_step", &decode_step, arg("layers"), arg("caches"), arg("L"), arg("embedding"), arg("norm"),
        arg("head"), arg("head_scale"), arg("head_kind"), arg("ids"), arg("cos"), arg("sin"), arg("angle_stride"),
        arg("first"), arg("ends"), arg("logits"), arg("R"), arg("T"), arg("keep"), arg("C"), arg("H"), arg("Hkv"),
        arg("D"), arg("F"), arg("V"), arg("bytes"), arg("eps"), arg("ring"), arg("dtype"));
  m.def("packed_linear", &packed_linear, arg("weight"), arg("scale"), arg("bias"), arg("kind"), arg("x"), arg("y"),
        arg("rows"), arg("N"), arg("K"), arg("x_stride"), arg("dtype"));
}

}  // namespace pyllm
