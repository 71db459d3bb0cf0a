// The products by compute type. Each is compiled in a file of its own, side by side with the others; what else they
// depend on at run time is chosen there.
#pragma once

#include <initializer_list>

#include "numeric.h"
#include "parameters.h"
#include "simt/queue.h"

namespace fastvit {

using simt::Queue;

// Compute is half, bfloat16 or float; float is multiplied at TF32 precision where `tf32` is true.
template <class Compute>
void launch_forward(Type image, bool tf32, const PatchEmbed& p, const Queue& queue);

template <class Compute>
void launch_image_gradient(bool tf32, const ImageGradient& p, const Queue& queue);

template <class Compute>
void launch_weight_gradient(Type image, bool tf32, const WeightGradient& p, const Queue& queue);

// The same of images of any sizes.
template <class Compute>
void launch_packed_forward(Type image, bool tf32, const PatchEmbed& p, const Queue& queue);

template <class Compute>
void launch_packed_weight_gradient(Type image, bool tf32, const WeightGradient& p, const Queue& queue);

// Rows that a split of the weight gradient is a multiple of: those of a step of its largest tile.
constexpr int WEIGHT_GRADIENT_STEP = 64;

// The widest of the given vectors of pixels that every row of a patch consists of, else 1.
inline int pixel_vector(const Patches& p, Type type, std::initializer_list<int> vectors) {
  for (const int vector : vectors) {
    const bool fits = p.stretch % vector == 0 && p.row_stride % vector == 0 && p.plane_stride % vector == 0 &&
                      p.batch_stride % vector == 0;
    const int bytes = vector * bytes_of(type) < 16 ? vector * bytes_of(type) : 16;
    if (fits && reinterpret_cast<uintptr_t>(p.images) % bytes == 0) return vector;
  }
  return 1;
}

#if defined(FASTVIT_HAS_SM90A)
constexpr bool HAS_SM90A = true;
#else
constexpr bool HAS_SM90A = false;
#endif

// Whether the warpgroups of sm_90a multiply: 16-bit values, unless pixels are of the other 16-bit type, for whose
// conversion registers do not suffice.
inline bool has_warpgroups(Type image, Type compute, const Queue& queue) {
  return HAS_SM90A && queue.capability == 90 && bytes_of(compute) == 2 && (bytes_of(image) != 2 || image == compute);
}

// Whether large tiles are enough to keep every multiprocessor busy.
inline bool fills(const Queue& queue, int64_t rows, int tile_rows, int columns, int tile_columns) {
  return (rows + tile_rows - 1) / tile_rows * ((columns + tile_columns - 1) / tile_columns) >= queue.processors;
}

constexpr int STREAM_ROWS = 192;  // of a tile of a stream, whose columns are those of a tile of W'

// Whether the tokens are made by streams of the warpgroups' tiles, to which W' lies in tiles too.
inline bool has_stream(const Patches& p, int width, Type image, Type compute, const Queue& queue) {
  return !p.packed.places && has_warpgroups(image, compute, queue) && pixel_vector(p, image, {EIGHT}) == EIGHT &&
         fills(queue, p.rows(), STREAM_ROWS, width, WEIGHT_TILE_ROWS);
}

// The tile that the weight gradient is made of, columns of the gradient by values of k, and how many blocks its splits
// are to give: as many as an H100 holds at once. Constants, so that sums are divided alike on every GPU of a kind.
struct WeightGradientTile {
  int columns, values, blocks;
};

// Splitting the rows makes enough of large tiles. They are for 16-bit products whose operands are both read eight
// values at a time.
inline WeightGradientTile weight_gradient_tile(const WeightGradient& p, Type image, Type compute, const Queue& queue) {
  const bool is_large = bytes_of(compute) == 2 && p.width >= 128 && p.width % EIGHT == 0 && is_aligned(p.grad) &&
                        p.pixels.k_length >= 128 && pixel_vector(p.pixels, image, {EIGHT}) == EIGHT;
  if (!is_large) return {64, 64, 264};
  const bool by_warpgroups = !p.pixels.packed.places && has_warpgroups(image, compute, queue);
  const int side = by_warpgroups ? simt::WARPGROUP_COLUMNS : 128;
  return {side, side, 132};
}

#if defined(FASTVIT_HAS_SM90A)
// By the warpgroups of sm_90a, the tokens where has_stream.
template <class Compute>
void launch_forward_sm90a(Type image, PatchEmbed p, const Queue& queue);

template <class Compute>
void launch_weight_gradient_sm90a(Type image, const WeightGradient& p, const Queue& queue);
#endif

}  // namespace fastvit
