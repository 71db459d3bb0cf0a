// The products of patch_embed for images of any sizes: those of images of one size, whose rows have places of their own.
// Included by the files that compile them, one for each compute type.
#pragma once

#include "patch_embed_instances.h"

namespace fastvit {

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_packed_forward(PatchEmbed p) {
  make_tokens<Image, VECTOR, Tile, Product, true>(p);
}

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_packed_weight_gradient(WeightGradient p) {
  sum_products<Image, VECTOR, Tile, Product, true>(p);
}

template <class Image, int VECTOR, class Tile, class Product>
void launch_packed_forward_tile(PatchEmbed p, const Queue& queue) {
  using Memory = ForwardMemory<Tile, true>;
  static_assert(Memory::BYTES <= MOST_SHARED_BYTES<Tile>, "too much shared memory");
  p.pixels.step = p.pixels.place_of(Tile::BK);
  const PackedRows& packed = p.pixels.packed;
  const int prefix = packed.count * p.prefix_rows;
  const int tiles = simt::blocks_for(packed.rows, Tile::BM) + simt::blocks_for(prefix, Tile::BM);
  simt::launch(queue, patch_embed_packed_forward<Image, VECTOR, Tile, Product>,
               tiles * simt::blocks_for(p.width, Tile::BN), 1, Tile::THREADS, Memory::BYTES, p);
}

// Calls `use` with the widest vector of pixels as a std::integral_constant, or with 1: kernels are few here.
template <class Compute, class Use>
void with_wide_vector(const Patches& p, Type type, Use use) {
  constexpr int WIDE = sizeof(Compute) == 2 ? 8 : 4;
  if (pixel_vector(p, type, {WIDE}) == WIDE) return use(std::integral_constant<int, WIDE>{});
  use(std::integral_constant<int, 1>{});
}

template <class Compute>
void launch_packed_forward(Type image, bool tf32, const PatchEmbed& p, const Queue& queue) {
  using Small = SmallTile<Compute>;
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    with_wide_vector<Compute>(p.pixels, image, [&](auto vector) {
      constexpr int VECTOR = decltype(vector)::value;
      if constexpr (sizeof(Compute) == 4) {
        if (!tf32) return launch_packed_forward_tile<Image, VECTOR, Small, MultiplyAddsByRows<Small>>(p, queue);
      }
      if constexpr (VECTOR > 1) {
        using Large = LargeTile<Compute>;
        if (fills(queue, p.pixels.packed.rows, Large::BM, p.width, Large::BN)) {
          return launch_packed_forward_tile<Image, VECTOR, Large, TensorCoresByRows<Large>>(p, queue);
        }
      }
      launch_packed_forward_tile<Image, VECTOR, Small, TensorCoresByRows<Small>>(p, queue);
    });
  });
}

template <class Image, int VECTOR, class Tile, class Product>
void launch_packed_weight_gradient_tile(const WeightGradient& p, const Queue& queue) {
  using Memory = WeightGradientMemory<Tile, true>;
  static_assert(WEIGHT_GRADIENT_STEP % Tile::BK == 0, "a split is whole steps");
  static_assert(Memory::BYTES <= MOST_SHARED_BYTES<Tile>, "too much shared memory");
  const int tiles = simt::blocks_for(p.width, Tile::BM) * simt::blocks_for(p.pixels.k_padded, Tile::BN);
  simt::launch(queue, patch_embed_packed_weight_gradient<Image, VECTOR, Tile, Product>, tiles,
               simt::blocks_for(p.pixels.packed.rows, p.rows_per_split), Tile::THREADS, Memory::BYTES, p);
}

template <class Compute>
void launch_packed_weight_gradient(Type image, bool tf32, const WeightGradient& p, const Queue& queue) {
  using Small = SmallTile<Compute>;
  const WeightGradientTile tile = weight_gradient_tile(p, image, type_of<Compute>(), queue);
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    with_wide_vector<Compute>(p.pixels, image, [&](auto vector) {
      constexpr int VECTOR = decltype(vector)::value;
      if constexpr (sizeof(Compute) == 4) {
        if (!tf32) {
          return launch_packed_weight_gradient_tile<Image, VECTOR, Small, MultiplyAddsByColumns<Small>>(p, queue);
        }
      } else if constexpr (VECTOR == EIGHT) {
        // Shorter steps than LargeTile's, beside whose three there is no room for the strides of their rows.
        using Large = Tile<Compute, 128, 128, 32, 64, 32, 4, 1>;
        if (tile.values == 128) {
          return launch_packed_weight_gradient_tile<Image, VECTOR, Large, TensorCoresByColumns<Large>>(p, queue);
        }
      }
      launch_packed_weight_gradient_tile<Image, VECTOR, Small, TensorCoresByColumns<Small>>(p, queue);
    });
  });
}

}  // namespace fastvit
