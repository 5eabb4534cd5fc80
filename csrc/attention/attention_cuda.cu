// Attention's entry points. Each dtype of each pass has a source file of its own, so that they compile side by side.
#include "attention/sequences.cuh"
#include "common/launch.cuh"

namespace pyllm {

int attention_fwd(const Attention& a, void* stream) {
  if (a.T == 0 || a.H == 0 || a.D == 0 || (a.B == 0 && !a.cu_q)) return 0;
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

// Three blocks for every multiprocessor keep the memory busy, but a split of fewer than 128 keys is not worth the join.
int64_t attention_decode_splits(int64_t B, int64_t T, int64_t keys, int64_t H, int64_t Hkv, int64_t multiprocessors) {
  if (B == 0 || T == 0 || H == 0) return 1;
  const int64_t blocks = B * Hkv * ceil_div(T * (H / Hkv), 16);
  const int64_t wanted = 3 * multiprocessors / blocks, most = keys / 128;
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits < 128 ? splits : 128;
}

}  // namespace pyllm
