// The products by warpgroups; compiled for sm_90a alone.
#include <algorithm>

#include "patch_embed_instances.h"
#include "patch_embed_stream.h"

namespace fastvit {

// Three warpgroups, a square: for its size it reads least, and 192 divides the width of most models.
template <class Compute>
using WarpgroupTile = Tile<Compute, STREAM_ROWS, simt::WARPGROUP_COLUMNS, 64, 16, simt::WARPGROUP_COLUMNS, 4, 1>;

// Calls `use` with the type of the images, which has_warpgroups.
template <class Compute, class Use>
void with_pixel(Type image, Use use) {
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    if constexpr (sizeof(Image) != 2 || std::is_same_v<Image, Compute>) use(pixel);
  });
}

template <class Compute>
void launch_forward_sm90a(Type image, PatchEmbed p, const Queue& queue) {
  using Large = WarpgroupTile<Compute>;
  using Product = WarpgroupByRows<Large>;
  static_assert(StreamMemory<Large>::BYTES <= MOST_SHARED_BYTES<Large>, "too much shared memory");
  p.pixels.step = p.pixels.place_of(Large::BK);
  const int tiles_n = simt::blocks_for(p.width, Large::BN);
  const int prefix_tiles = simt::blocks_for(p.pixels.batch * p.prefix_rows, CLUSTER * Large::BM) * tiles_n;
  const int tiles = simt::blocks_for(p.pixels.rows(), CLUSTER * Large::BM) * tiles_n;
  const int clusters = std::min(tiles, std::max(1, queue.processors / CLUSTER));
  with_pixel<Compute>(image, [&](auto pixel) {
    simt::launch(queue, patch_embed_forward_stream<decltype(pixel), EIGHT, Large, Product>,
                 CLUSTER * (prefix_tiles + clusters), 1, Roles<Large>::THREADS, StreamMemory<Large>::BYTES, p, CLUSTER);
  });
}

template <class Compute>
void launch_weight_gradient_sm90a(Type image, const WeightGradient& p, const Queue& queue) {
  using Large = WarpgroupTile<Compute>;
  with_pixel<Compute>(image, [&](auto pixel) {
    launch_weight_gradient_tile<decltype(pixel), EIGHT, Large, WarpgroupByColumns<Large>>(p, queue);
  });
}

#if !defined(FASTVIT_FEW_TYPES)
template void launch_forward_sm90a<half>(Type, PatchEmbed, const Queue&);
template void launch_weight_gradient_sm90a<half>(Type, const WeightGradient&, const Queue&);
#endif
template void launch_forward_sm90a<bfloat16>(Type, PatchEmbed, const Queue&);
template void launch_weight_gradient_sm90a<bfloat16>(Type, const WeightGradient&, const Queue&);

}  // namespace fastvit
