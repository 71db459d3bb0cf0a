// The products by warpgroups; compiled for sm_90a alone.
#include "patch_embed_instances.h"

namespace fastvit {

template <class Compute>
bool launch_forward_sm90a(Type image, const PatchEmbed& p, const Queue& queue) {
  bool is_launched = false;
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    // Two blocks, each of which hides the other's waits, but for float32 pixels, which take too many registers.
    constexpr bool IS_WIDE = sizeof(Image) == 4;
    using Large = Tile<Compute, 128, 128, 64, 16, 128, IS_WIDE ? 4 : 3, IS_WIDE ? 1 : 2>;
    if (pixel_vector(p.pixels, image, {8}) != 8 || !fills(queue, p.pixels.rows(), p.width)) return;
    launch_forward_tile<Image, 8, Large, WarpgroupByRows<Large>>(p, queue);
    is_launched = true;
  });
  return is_launched;
}

template <class Compute>
void launch_weight_gradient_sm90a(Type image, const WeightGradient& p, const Queue& queue) {
  with_image<Compute>(image, [&](auto pixel) {
    using Large = Tile<Compute, 128, 256, 64, 16, 256, 4, 1>;
    launch_weight_gradient_tile<decltype(pixel), EIGHT, Large, WarpgroupByColumns<Large>>(p, queue);
  });
}

#if !defined(FASTVIT_FEW_TYPES)
template bool launch_forward_sm90a<half>(Type, const PatchEmbed&, const Queue&);
template void launch_weight_gradient_sm90a<half>(Type, const WeightGradient&, const Queue&);
#endif
template bool launch_forward_sm90a<bfloat16>(Type, const PatchEmbed&, const Queue&);
template void launch_weight_gradient_sm90a<bfloat16>(Type, const WeightGradient&, const Queue&);

}  // namespace fastvit
