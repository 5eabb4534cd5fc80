// The kernels of attention_decode.cuh for one dtype.
#include "attention/attention_decode.cuh"

namespace pyllm {
template <>
int attention_decode_of<bf16>(const AttentionDecode& args, void* stream) {
  return attention_decode_tiled<bf16>(args, stream);
}
}  // namespace pyllm
