// Attention's entry points. Each dtype of each pass has a source file of its own, so that they compile side by side.
#include "attention/sequences.cuh"
#include "common/launch.cuh"

namespace pyllm {

// What TMA can read: see BoxedTensor (common/hopper.cuh) and cuTensorMapEncodeTiled in CUDA's driver API.
const char* hopper_refuses(const Attention& a) {
  if (a.dtype == DType::kFloat32) return "dtype must be a 16-bit one";
  if (a.D < 1 || a.D > 256) return "D must be between 1 and 256";
  if (a.S == 0) return "S must be at least 1";
  if (a.T > INT32_MAX || a.S > INT32_MAX || a.H > INT32_MAX) return "T, S and H must be below 2^31";
  auto fits = [&](const void* x, const AttentionStride& stride, int64_t rows, int64_t heads) {
    auto dimension = [](int64_t n, int64_t s) { return n <= 1 || (s > 0 && s % 8 == 0 && s < int64_t(1) << 39); };
    return reinterpret_cast<uintptr_t>(x) % 16 == 0 && dimension(heads, stride.head) && dimension(rows, stride.row) &&
           dimension(a.cu_q ? 1 : a.B, stride.batch);
  };
  if (!fits(a.q, a.q_stride, a.T, a.H)) return "q must be aligned to 16 bytes, with strides that are multiples of 8";
  if (!fits(a.k, a.k_stride, a.S, a.Hkv)) return "k must be aligned to 16 bytes, with strides that are multiples of 8";
  if (!fits(a.v, a.v_stride, a.S, a.Hkv)) return "v must be aligned to 16 bytes, with strides that are multiples of 8";
  return nullptr;
}

// The build defines PYLLM_SM90A for every source when it compiles those named *_sm90a_cuda.cu.
bool has_hopper() {
#if defined(PYLLM_SM90A)
  return true;
#else
  return false;
#endif
}

int attention_fwd(const Attention& a, void* stream) {
  if (a.T == 0 || a.H == 0 || a.D == 0 || (a.B == 0 && !a.cu_q)) return 0;
#if defined(PYLLM_SM90A)
  if (a.hopper) {
    if (a.dtype == DType::kBFloat16) return attention_hopper_of<bf16>(a, stream);
    if (a.dtype == DType::kFloat16) return attention_hopper_of<f16>(a, stream);
    return int(cudaErrorInvalidValue);
  }
#endif
  return dispatch(a.dtype, [&](auto t) { return attention_fwd_of<typename decltype(t)::type>(a, stream); });
}

int attention_bwd(const AttentionBackward& b, void* stream) {
  const Attention& a = b.forward;
  if (a.H == 0 || a.D == 0 || (a.T == 0 && a.S == 0) || (a.B == 0 && !a.cu_q)) return 0;
  return dispatch(a.dtype, [&](auto t) { return attention_bwd_of<typename decltype(t)::type>(b, stream); });
}

int attention_decode(const AttentionDecode& a, void* stream) {
  if (a.B == 0 || a.T == 0 || a.H == 0 || a.D == 0) return 0;
  return dispatch(a.dtype, [&](auto t) { return attention_decode_of<typename decltype(t)::type>(a, stream); });
}

// Two blocks for every multiprocessor keep the memory busy (an H100 is 3 % slower with three and 8 % with four), and a
// split of fewer than 128 keys is not worth the join.
int64_t attention_decode_splits(int64_t B, int64_t T, int64_t keys, int64_t H, int64_t Hkv, int64_t multiprocessors) {
  if (B == 0 || T == 0 || H == 0) return 1;
  const int64_t blocks = B * Hkv * ceil_div(T * (H / Hkv), 16);
  const int64_t wanted = 2 * multiprocessors / blocks, most = keys / 128;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits < 128 ? splits : 128;
}

}  // namespace pyllm
