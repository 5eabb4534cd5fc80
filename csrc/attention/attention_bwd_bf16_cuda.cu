// The backward of attention_bwd.cuh for one dtype.
#include "attention/attention_bwd.cuh"

namespace pyllm {
template <>
int attention_bwd_of<bf16>(const AttentionBackward& args, void* stream) {
  return attention_bwd_tiled<bf16>(args, stream);
}
}  // namespace pyllm
