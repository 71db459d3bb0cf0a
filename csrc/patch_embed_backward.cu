// The instantiations of patch_embed's weight gradient for tensor cores.
#include "patch_embed_backward.h"

namespace fastvit {

#define INSTANTIATE(image, compute) \
  template void launch_weight_gradient<image, compute>(const WeightGradient&, simt::Stream&);
INSTANTIATE(uint8_t, bfloat16)
INSTANTIATE(bfloat16, bfloat16)
INSTANTIATE(half, bfloat16)
INSTANTIATE(float, bfloat16)
INSTANTIATE(uint8_t, half)
INSTANTIATE(half, half)
INSTANTIATE(bfloat16, half)
INSTANTIATE(float, half)
#undef INSTANTIATE

}  // namespace fastvit
