// Which kernels exist, and which of them runs. Included by the files that compile them, one for each compute type.
#pragma once

#include <stdexcept>

#include "patch_embed_forward.h"
#include "patch_embed_launch.h"
#include "patch_embed_weight_gradient.h"
#include "simt/launch.h"

namespace fastvit {

template <class T>
constexpr Type type_of() {
  return std::is_same_v<T, float> ? Type::FLOAT32 : std::is_same_v<T, half> ? Type::FLOAT16 : Type::BFLOAT16;
}

// Calls `use(Image{})` with the type of the images.
template <class Compute, class Use>
void with_image(Type type, Use use) {
#if defined(FASTVIT_FEW_TYPES)  // builds in which a fault is planted: images of the compute type, or uint8
  if (type == Type::UINT8) return use(uint8_t{});
  if (type == type_of<Compute>()) return use(Compute{});
  throw std::invalid_argument("images: this build has kernels for uint8 and the compute type alone");
#else
  switch (type) {
    case Type::FLOAT32: return use(float{});
    case Type::FLOAT16: return use(half{});
    case Type::BFLOAT16: return use(bfloat16{});
    case Type::UINT8: return use(uint8_t{});
    default: throw std::invalid_argument("images: no kernel for this type");
  }
#endif
}

// Calls `use` with the widest vector of pixels of `type` there are kernels for, as a std::integral_constant.
template <class Compute, class Use>
void with_vector(const Patches& p, Type type, Use use) {
  if constexpr (sizeof(Compute) == 2) {
    const int vector = pixel_vector(p, type, {8, 2});
    if (vector == 8) return use(std::integral_constant<int, 8>{});
    if (vector == 2) return use(std::integral_constant<int, 2>{});
  } else {
    if (pixel_vector(p, type, {4}) == 4) return use(std::integral_constant<int, 4>{});
  }
  use(std::integral_constant<int, 1>{});
}

// Rows a block, columns, values of the reduction; of a warp; stages; blocks a multiprocessor.
template <class Compute>
using SmallTile = std::conditional_t<sizeof(Compute) == 2, Tile<Compute, 64, 64, 32, 32, 32, 3, 2>,
                                     Tile<Compute, 64, 64, 16, 32, 32, 3, 2>>;
template <class Compute>
using LargeTile = Tile<Compute, 128, 128, 128 / sizeof(Compute), 64, 32, 3, 1>;

// Of a block: on sm_90, where warpgroups are, or on sm_86, sm_89 and sm_120; others have more.
template <class Tile>
constexpr int MOST_SHARED_BYTES = (Tile::BY_WARPGROUPS ? 227 : 99) * 1024;

template <class Image, int VECTOR, class Tile, class Product>
void launch_forward_tile(PatchEmbed p, const Queue& queue) {
  static_assert(ForwardMemory<Tile>::BYTES <= MOST_SHARED_BYTES<Tile>, "too much shared memory");
  p.pixels.step = p.pixels.place_of(Tile::BK);
  const int prefix = p.pixels.batch * p.prefix_rows;
  const int tiles = simt::blocks_for(p.pixels.rows(), Tile::BM) + simt::blocks_for(prefix, Tile::BM);
  simt::launch(queue, patch_embed_forward<Image, VECTOR, Tile, Product>, tiles * simt::blocks_for(p.width, Tile::BN), 1,
               Tile::THREADS, ForwardMemory<Tile>::BYTES, p);
}

template <class Compute>
void launch_forward(Type image, bool tf32, const PatchEmbed& p, const Queue& queue) {
  using Small = SmallTile<Compute>;
#if defined(FASTVIT_HAS_SM90A)
  if constexpr (sizeof(Compute) == 2) {
    const bool is_stream = has_stream(p.pixels, p.width, image, type_of<Compute>(), queue);
    if (is_stream) return launch_forward_sm90a<Compute>(image, p, queue);
  }
#endif
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    with_vector<Compute>(p.pixels, image, [&](auto vector) {
      constexpr int VECTOR = decltype(vector)::value;
      if constexpr (sizeof(Compute) == 4) {
        if (!tf32) return launch_forward_tile<Image, VECTOR, Small, MultiplyAddsByRows<Small>>(p, queue);
      }
      if constexpr (VECTOR >= 4) {
        using Large = LargeTile<Compute>;
        if (fills(queue, p.pixels.rows(), Large::BM, p.width, Large::BN)) {
          return launch_forward_tile<Image, VECTOR, Large, TensorCoresByRows<Large>>(p, queue);
        }
      }
      launch_forward_tile<Image, VECTOR, Small, TensorCoresByRows<Small>>(p, queue);
    });
  });
}

template <class Compute, int VECTOR, class Tile, class Product>
void launch_image_gradient_tile(ImageGradient p, const Queue& queue) {
  p.gradients.step = p.gradients.place_of(Tile::BK);
  const int tiles = simt::blocks_for(p.target.rows(), Tile::BM) * simt::blocks_for(p.target.k_length, Tile::BN);
  simt::launch(queue, patch_embed_image_gradient<Compute, VECTOR, Tile, Product>, tiles, 1, Tile::THREADS,
               ForwardMemory<Tile>::BYTES, p);
}

template <class Compute>
void launch_image_gradient(bool tf32, const ImageGradient& given, const Queue& queue) {
  using Small = SmallTile<Compute>;
  ImageGradient p = given;
  p.is_wide = pixel_vector(p.target, p.target_type, {8}) == 8;
  with_vector<Compute>(p.gradients, type_of<Compute>(), [&](auto vector) {
    constexpr int VECTOR = decltype(vector)::value;
    if constexpr (sizeof(Compute) == 4) {
      if (!tf32) return launch_image_gradient_tile<Compute, VECTOR, Small, MultiplyAddsByRows<Small>>(p, queue);
    }
    if constexpr (VECTOR >= 4) {
      using Large = LargeTile<Compute>;
      if (fills(queue, p.target.rows(), Large::BM, p.target.k_length, Large::BN)) {
        return launch_image_gradient_tile<Compute, VECTOR, Large, TensorCoresByRows<Large>>(p, queue);
      }
    }
    launch_image_gradient_tile<Compute, VECTOR, Small, TensorCoresByRows<Small>>(p, queue);
  });
}

template <class Image, int VECTOR, class Tile, class Product>
void launch_weight_gradient_tile(const WeightGradient& p, const Queue& queue) {
  static_assert(WEIGHT_GRADIENT_STEP % Tile::BK == 0, "a split is whole steps");
  static_assert(WeightGradientMemory<Tile>::BYTES <= MOST_SHARED_BYTES<Tile>, "too much shared memory");
  const int tiles = simt::blocks_for(p.width, Tile::BM) * simt::blocks_for(p.pixels.k_padded, Tile::BN);
  simt::launch(queue, patch_embed_weight_gradient<Image, VECTOR, Tile, Product>, tiles,
               simt::blocks_for(p.pixels.rows(), p.rows_per_split), Tile::THREADS, WeightGradientMemory<Tile>::BYTES, p);
}

template <class Compute>
void launch_weight_gradient(Type image, bool tf32, const WeightGradient& p, const Queue& queue) {
  using Small = SmallTile<Compute>;
  const WeightGradientTile tile = weight_gradient_tile(p, image, type_of<Compute>(), queue);
#if defined(FASTVIT_HAS_SM90A)
  if constexpr (sizeof(Compute) == 2) {
    if (tile.values == simt::WARPGROUP_COLUMNS) return launch_weight_gradient_sm90a<Compute>(image, p, queue);
  }
#endif
  with_image<Compute>(image, [&](auto pixel) {
    using Image = decltype(pixel);
    with_vector<Compute>(p.pixels, image, [&](auto vector) {
      constexpr int VECTOR = decltype(vector)::value;
      if constexpr (sizeof(Compute) == 4) {
        if (!tf32) return launch_weight_gradient_tile<Image, VECTOR, Small, MultiplyAddsByColumns<Small>>(p, queue);
      } else if constexpr (VECTOR == EIGHT) {
        using Large = LargeTile<Compute>;
        if (tile.values == 128) {
          return launch_weight_gradient_tile<Image, VECTOR, Large, TensorCoresByColumns<Large>>(p, queue);
        }
      }
      launch_weight_gradient_tile<Image, VECTOR, Small, TensorCoresByColumns<Small>>(p, queue);
    });
  });
}

}  // namespace fastvit
