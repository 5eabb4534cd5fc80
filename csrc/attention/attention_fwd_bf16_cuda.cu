// The forward of attention_fwd.cuh for one dtype.
#include "attention/attention_fwd.cuh"

namespace pyllm {
template <>
int attention_fwd_of<bf16>(const Attention& args, void* stream) {
  return attention_fwd_tiled<bf16>(args, stream);
}
}  // namespace pyllm
