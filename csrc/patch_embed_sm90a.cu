// The products by warpgroups; compiled for sm_90a alone.
#include <algorithm>

#include "patch_embed_instances.h"
#include "patch_embed_stream.h"

namespace fastvit {

// Three warpgroups, a square: for its size it reads least, and 192 divides the width of most models.
template <class Compute>
using WarpgroupTile = Tile<Compute, 192, simt::WARPGROUP_COLUMNS, 64, 16, simt::WARPGROUP_COLUMNS, 4, 1>;

// Calls `use` with the type of the images, which has_warpgroups.
template <class Compute, class Use>
void with_pixel(Type image, Use use) {
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    if constexpr (sizeof(Image) != 2 || std::is_same_v<Image, Compute>) use(pixel);
  });
}

template <class Image, class Tile>
void launch_forward_stream(const PatchEmbed& p, const Queue& queue) {
  using Product = WarpgroupByRows<Tile>;
  static_assert(StreamMemory<Tile>::BYTES <= MOST_SHARED_BYTES<Tile>, "too much shared memory");
  const int tiles_n = simt::blocks_for(p.width, Tile::BN);
  const int prefix_tiles = simt::blocks_for(p.pixels.batch * p.prefix_rows, Tile::BM) * tiles_n;
  const int tiles = simt::blocks_for(p.pixels.rows(), Tile::BM) * tiles_n;
  // A block of short tiles has one alone: see StreamLoader.
  const bool is_short = p.pixels.k_length <= (Tile::STAGES - 1 - Product::IN_FLIGHT) * Tile::BK;
  const int blocks = is_short ? tiles : std::min(tiles, queue.processors);
  simt::launch(queue, patch_embed_forward_stream<Image, EIGHT, Tile, Product>, prefix_tiles + blocks, 1, Tile::THREADS,
               StreamMemory<Tile>::BYTES, p);
}

template <class Compute>
bool launch_forward_sm90a(Type image, const PatchEmbed& p, const Queue& queue) {
  using Large = WarpgroupTile<Compute>;
  if (pixel_vector(p.pixels, image, {EIGHT}) != EIGHT || !fills<Large>(queue, p.pixels.rows(), p.width)) return false;
  with_pixel<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    if constexpr (sizeof(Image) == 4) {  // registers do not suffice for a stream
      launch_forward_tile<Image, EIGHT, Large, WarpgroupByRows<Large>>(p, queue);
    } else {
      launch_forward_stream<Image, Large>(p, queue);
    }
  });
  return true;
}

template <class Compute>
void launch_weight_gradient_sm90a(Type image, const WeightGradient& p, const Queue& queue) {
  using Large = WarpgroupTile<Compute>;
  with_pixel<Compute>(image, [&](auto pixel) {
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
