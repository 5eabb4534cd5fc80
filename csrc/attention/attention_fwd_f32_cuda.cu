// The forward of attention_fwd.cuh for one dtype.
#include "attention/attention_fwd.cuh"

namespace pyllm {
template <>
int attention_fwd_of<float>(const Attention& args, void* stream) {
  return attention_fwd_tiled<float>(args, stream);
}
}  // namespace pyllm
