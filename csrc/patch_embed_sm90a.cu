// The forward product by warpgroups; compiled for sm_90a alone.
#include "patch_embed_instances.h"

namespace fastvit {

template <class Compute>
bool launch_forward_sm90a(Type image, const PatchEmbed& p, const Queue& queue) {
  bool is_launched = false;
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    // Two blocks, each of which hides the other's waits, but for float32 pixels, which take too many registers.
    using Large = Tile<Compute, 128, 128, 64, 16, 128, 3, sizeof(Image) == 4 ? 1 : 2>;
    if (pixel_vector(p.pixels, image, {8}) != 8 || !fills(queue, p.pixels.rows(), p.width)) return;
    launch_forward_tile<Image, 8, Large, WarpgroupByRows<Large>>(p, queue);
    is_launched = true;
  });
  return is_launched;
}

#if !defined(FASTVIT_FEW_TYPES)
template bool launch_forward_sm90a<half>(Type, const PatchEmbed&, const Queue&);
#endif
template bool launch_forward_sm90a<bfloat16>(Type, const PatchEmbed&, const Queue&);

}  // namespace fastvit
