// The forward of attention_hopper.cuh for one dtype. Files of this name are compiled for sm_90a alone (setup.py).
#include "attention/attention_hopper.cuh"

namespace pyllm {
template <>
int attention_hopper_of<f16>(const Attention& args, void* stream) {
  return attention_hopper_tiled<f16>(args, stream);
}
}  // namespace pyllm
