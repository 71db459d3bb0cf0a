// patch_embed, backward: the gradient of the weight, from patches that are rebuilt on the way.
//
// parts[s, d, k] = sum over the rows m of split s of grad[m, d] * pixel(m, k). A block computes a tile of BM columns of
// the gradient by BN values of k, BK rows m at a time. Rows lie in shared memory as they lie in the images, so that
// both operands of the product are read transposed. Splits are added in a second pass, always in the same order.
#pragma once

#include "patches.h"
#include "products.h"

namespace fastvit {

// The share of one thread in the loads of a step: some rows m, each a piece of the gradient and a piece of the pixels.
template <class Image, int VECTOR, class Tile>
struct WeightGradientLoader {
  using Compute = typename Tile::Compute;
  static constexpr int SIZE = Tile::SIZE;
  static constexpr int PIECE = VECTOR * SIZE < 4 ? 4 / SIZE : VECTOR;
  static constexpr int PIECES = Tile::BN / PIECE, ROWS = Tile::THREADS / PIECES, PASSES = Tile::BK / ROWS;
  static_assert(ROWS * PASSES == Tile::BK, "steps are whole passes");

  const WeightGradient& p;
  int first_column, pixel_row, pixel_column, pixel_k;
  int row;  // the first of the next step
  bool is_wide;
  PixelWalk walk;
  PixelCopier<Image, Compute, VECTOR, PASSES> pixels;

  SIMT_DEVICE WeightGradientLoader(const WeightGradient& p, int first_column, int first_k, int first_row)
      : p(p), first_column(first_column), row(first_row) {
    const int thread = simt::thread_index();
    pixel_row = thread / PIECES, pixel_column = thread % PIECES * PIECE, pixel_k = first_k + pixel_column;
    is_wide = p.width % EIGHT == 0 && is_aligned(p.grad);
    walk.start(p.pixels, pixel_k < p.pixels.k_length ? pixel_k : 0, 0);
  }

  SIMT_DEVICE void start(shared_address stage) {
    if (is_wide) {
      load_grad<16 / SIZE>(stage);
    } else {
      load_grad<4 / SIZE>(stage);
    }
    SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
      // A split is whole steps, so that it ends where the next begins.
      const int64_t origin = patch_origin(p.pixels, row + pixel_row + pass * ROWS);
      pixels.start(p.pixels, walk, pixel_k, origin, pass, pixel_place(stage, pass));
    }
    if constexpr (pixels.ASYNC) row += Tile::BK;
  }

  SIMT_DEVICE void finish(shared_address stage) {
    if constexpr (!pixels.ASYNC) {
      pixels.finish(p.pixels, pixel_k, [&](int pass) { return pixel_place(stage, pass); });
      row += Tile::BK;
    }
  }

 private:
  SIMT_DEVICE shared_address pixel_place(shared_address stage, int pass) const {
    return stage + Tile::second_place(pixel_row + pass * ROWS, pixel_column * SIZE);
  }

  // The gradients of the step's rows, COUNT columns at a time; zeros for patches that do not exist.
  template <int COUNT>
  SIMT_DEVICE void load_grad(shared_address stage) {
    constexpr int PIECES = Tile::BM / COUNT, ROWS = Tile::THREADS / PIECES;
    static_assert(Tile::BK % ROWS == 0, "steps are whole passes");
    const int tile_column = simt::thread_index() % PIECES * COUNT, column = first_column + tile_column;
    SIMT_UNROLL for (int pass = 0; pass < Tile::BK / ROWS; pass++) {
      const int tile_row = simt::thread_index() / PIECES + pass * ROWS;
      const bool is_inside = column < p.width && patch_origin(p.pixels, row + tile_row) >= 0;
      const Compute* from = static_cast<const Compute*>(p.grad);
      if (is_inside) from += token_row(p.pixels, p.prefix_rows, row + tile_row) * p.width + column;
      const shared_address to = stage + Tile::first_place(tile_row, tile_column * SIZE);
      if constexpr (COUNT * SIZE == 16 || COUNT == 1) {
        simt::copy_async<COUNT * SIZE>(to, from, is_inside);
      } else {
        // Two values of 16 bits that no word need hold, the second perhaps behind the width.
        const uint16_t* pair = reinterpret_cast<const uint16_t*>(from);
        uint32_t word = is_inside ? simt::load_element(pair) : 0;
        if (is_inside && column + 1 < p.width) word |= static_cast<uint32_t>(simt::load_element(pair + 1)) << 16;
        simt::store_shared<1>(to, {{word}});
      }
    }
  }
};

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_weight_gradient(WeightGradient p) {
  const int k_padded = p.pixels.k_padded, tiles_k = (k_padded + Tile::BN - 1) / Tile::BN;
  const int first_column = simt::block_x() / tiles_k * Tile::BM, first_k = simt::block_x() % tiles_k * Tile::BN;
  const int first_row = simt::block_y() * p.rows_per_split, rows = p.pixels.rows() - first_row;
  const int steps = ((rows < p.rows_per_split ? rows : p.rows_per_split) + Tile::BK - 1) / Tile::BK;

  WeightGradientLoader<Image, VECTOR, Tile> loader(p, first_column, first_k, first_row);
  Product product;
  run_pipeline<Tile>(simt::shared_base(), steps, loader, product);

  const int lane = simt::thread_index() % 32;
  float* part = p.parts + static_cast<int64_t>(simt::block_y()) * p.width * k_padded;
  SIMT_UNROLL for (int i = 0; i < Tile::WARP_M / 16; i++) {
    SIMT_UNROLL for (int j = 0; j < Tile::WARP_N / 8; j++) {
      SIMT_UNROLL for (int half = 0; half < 2; half++) {
        const int column = first_column + Tile::warp_row() + i * 16 + half * 8 + lane / 4;
        const int k = first_k + Tile::warp_column() + j * 8 + lane % 4 * 2;
        if (column >= p.width || k >= k_padded) continue;
        const float* pair = product.sums[i][j] + half * 2;
        simt::store_global<2>(part + static_cast<int64_t>(column) * k_padded + k,
                              {{simt::bits(pair[0]), simt::bits(pair[1])}});
      }
    }
  }
}

}  // namespace fastvit
