// The instantiations of patch_embed's forward kernel for tensor cores.
#include "patch_embed_forward.h"

namespace fastvit {

#define INSTANTIATE(image, compute)                                                         \
  template void launch_patch_embed<image, compute, compute>(const PatchEmbed&, simt::Stream&); \
  template void launch_patch_embed<image, compute, float>(const PatchEmbed&, simt::Stream&);
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
