// patch_embed, backward: the gradient of the weight, from patches that are rebuilt on the way.
//
// parts[s, d, k] = sum over the rows m of split s of grad[m, d] * pixel(m, k). A block computes a tile of BM columns of
// the gradient by BN values of k, BK rows m at a time. Rows lie in shared memory as they lie in the images, so that
// both operands of the product are read transposed. Splits are added in a second pass, always in the same order.
#pragma once

#include "patch_embed_forward.h"

namespace fastvit {

template <int BM_, int BN_, int BK_, int WARP_M_, int WARP_N_, int STAGES_, int BLOCKS_>
struct WeightGradientTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, WARP_M = WARP_M_, WARP_N = WARP_N_, STAGES = STAGES_;
  static constexpr int BLOCKS = BLOCKS_;
  static constexpr int THREADS = (BM / WARP_M) * (BN / WARP_N) * 32;
  static constexpr int GRAD_BYTES = BK * BM * 2, PIXEL_BYTES = BK * BN * 2, STAGE_BYTES = GRAD_BYTES + PIXEL_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

// The share of one thread in the loads of a step: some rows m, each a piece of the gradient and a piece of the pixels.
template <class Image, class Compute, int VECTOR, bool WIDE, class Tile>
struct WeightGradientLoader {
  static constexpr bool ASYNC = std::is_same_v<Image, Compute> && VECTOR > 1;
  static constexpr int PIECE = VECTOR > 1 ? VECTOR : 2;
  static constexpr int PIECES = Tile::BN / PIECE, ROWS = Tile::THREADS / PIECES, PASSES = Tile::BK / ROWS;
  static constexpr int GRAD_PIECE = WIDE ? 8 : 2;
  static constexpr int GRAD_PIECES = Tile::BM / GRAD_PIECE, GRAD_ROWS = Tile::THREADS / GRAD_PIECES;
  static constexpr int GRAD_PASSES = Tile::BK / GRAD_ROWS;
  static_assert(ROWS * PASSES == Tile::BK && GRAD_ROWS * GRAD_PASSES == Tile::BK, "steps are whole passes");

  const WeightGradient& p;
  shared_address stages;
  int first_column, pixel_row, pixel_column, pixel_k, grad_row, grad_column;
  int64_t row;  // the first of the next step
  PixelWalk walk;
  RawPixels<Image, PIECE> raw[ASYNC ? 1 : PASSES];

  SIMT_DEVICE WeightGradientLoader(const WeightGradient& p, shared_address stages, int first_column, int first_k,
                                   int64_t first_row)
      : p(p), stages(stages), first_column(first_column), row(first_row) {
    const int thread = simt::thread_index();
    pixel_row = thread / PIECES, pixel_column = thread % PIECES * PIECE, pixel_k = first_k + pixel_column;
    grad_row = thread / GRAD_PIECES, grad_column = thread % GRAD_PIECES * GRAD_PIECE;
    walk.start(p.forward, pixel_k < p.forward.k_length ? pixel_k : 0, 0);
  }

  SIMT_DEVICE void start(int stage) {
    const shared_address base = stages + stage * Tile::STAGE_BYTES;
    SIMT_UNROLL for (int pass = 0; pass < GRAD_PASSES; pass++) load_grad(base, grad_row + pass * GRAD_ROWS);
    SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) load_pixels(base, pass);
    if constexpr (ASYNC) row += Tile::BK;
  }

  SIMT_DEVICE void finish(int stage) {
    if constexpr (!ASYNC) {
      const shared_address base = stages + stage * Tile::STAGE_BYTES + Tile::GRAD_BYTES;
      SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
        const int tile_row = pixel_row + pass * ROWS;
        const bool is_real = origin_of(tile_row) >= 0;
        simt::Vector<PIECE / 2> words;
        SIMT_UNROLL for (int i = 0; i < PIECE / 2; i++) {
          const float first = pixel(pass, 2 * i, is_real), second = pixel(pass, 2 * i + 1, is_real);
          words.word[i] = simt::pack<Compute>(first, second);
        }
        simt::store_shared<PIECE / 2>(base + swizzled<Tile::BN>(tile_row, pixel_column), words);
      }
      row += Tile::BK;
    }
  }

 private:
  SIMT_DEVICE int64_t origin_of(int tile_row) const {
    return patch_origin(p.forward, row + tile_row);  // a split is whole steps, so that it ends where the next begins
  }

  SIMT_DEVICE void load_grad(shared_address base, int tile_row) {
    const PatchEmbed& f = p.forward;
    const int64_t m = row + tile_row;
    const int column = first_column + grad_column;
    // A patch that does not exist contributes to no gradient.
    const bool is_inside = column < f.width && origin_of(tile_row) >= 0;
    const Compute* from = static_cast<const Compute*>(p.grad);
    if (is_inside) {
      const int64_t image = m / f.kept;
      const int64_t token = image * (f.prefix_rows + f.kept) + f.prefix_rows + (m - image * f.kept);
      from += token * f.width + column;
    }
    const shared_address target = base + swizzled<Tile::BM>(tile_row, grad_column);
    if constexpr (WIDE) {
      simt::copy_async<16>(target, from, is_inside);
    } else {
      uint32_t word = 0;
      if (is_inside) word = simt::load_element(reinterpret_cast<const uint16_t*>(from));
      if (is_inside && column + 1 < f.width) {
        word |= static_cast<uint32_t>(simt::load_element(reinterpret_cast<const uint16_t*>(from + 1))) << 16;
      }
      simt::store_shared<1>(target, {{word}});
    }
  }

  SIMT_DEVICE void load_pixels(shared_address base, int pass) {
    const int tile_row = pixel_row + pass * ROWS;
    const int64_t origin = origin_of(tile_row);
    const bool is_inside = origin >= 0 && pixel_k < p.forward.k_length;
    const Image* images = static_cast<const Image*>(p.forward.images);
    const Image* from = is_inside ? images + origin + walk.offset(p.forward) : images;
    if constexpr (ASYNC) {
      const shared_address target = base + Tile::GRAD_BYTES + swizzled<Tile::BN>(tile_row, pixel_column);
      simt::copy_async<PIECE * 2>(target, from, is_inside);
    } else if constexpr (VECTOR > 1) {
      if (is_inside) {
        raw[pass].load(from);
      } else {
        raw[pass].clear();
      }
    } else {
      load_pixel_pair(p.forward, walk, pixel_k, images, origin, is_inside, raw[pass]);
    }
  }

  SIMT_DEVICE float pixel(int pass, int i, bool is_real) const {
    if (!is_real || pixel_k + i >= p.forward.k_length) return 0.0f;
    return normalised(p.forward, raw[pass].value(i), pixel_k + i);
  }
};

// Multiplies one stage: gradient columns by k, both read from rows of m.
template <class Compute, class Tile>
SIMT_DEVICE void multiply_transposed(shared_address stage, int warp_row, int warp_column,
                                     float (&sums)[Tile::WARP_M / 16][Tile::WARP_N / 8][4]) {
  constexpr int ROWS = Tile::WARP_M / 16, COLUMNS = Tile::WARP_N / 8;
  const int lane = simt::thread_index() % 32;
  SIMT_UNROLL for (int m = 0; m < Tile::BK; m += 16) {
    uint32_t a[ROWS][4], b[COLUMNS / 2][4];
    SIMT_UNROLL for (int i = 0; i < ROWS; i++) {
      const int row = m + lane / 16 * 8 + lane % 8, column = warp_row + i * 16 + lane / 8 % 2 * 8;
      simt::load_matrices_transposed(a[i], stage + swizzled<Tile::BM>(row, column));
    }
    SIMT_UNROLL for (int j = 0; j < COLUMNS / 2; j++) {
      const int row = m + lane / 8 % 2 * 8 + lane % 8, column = warp_column + j * 16 + lane / 16 * 8;
      simt::load_matrices_transposed(b[j], stage + Tile::GRAD_BYTES + swizzled<Tile::BN>(row, column));
    }
    SIMT_UNROLL for (int i = 0; i < ROWS; i++) {
      SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
        simt::multiply_add<Compute>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

template <class Image, class Compute, int VECTOR, bool WIDE, class Tile>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_weight_gradient(WeightGradient p) {
  constexpr int STAGES = Tile::STAGES, WARPS_A_ROW = Tile::BN / Tile::WARP_N;
  const PatchEmbed& f = p.forward;
  const int tiles_k = (f.k_padded + Tile::BN - 1) / Tile::BN;
  const int first_column = simt::block_x() / tiles_k * Tile::BM, first_k = simt::block_x() % tiles_k * Tile::BN;
  const int64_t rows = static_cast<int64_t>(f.batch) * f.kept;
  const int64_t first_row = static_cast<int64_t>(simt::block_y()) * p.rows_per_split;
  const int64_t last_row = first_row + p.rows_per_split < rows ? first_row + p.rows_per_split : rows;
  const int steps = static_cast<int>((last_row - first_row + Tile::BK - 1) / Tile::BK);

  const shared_address pipeline = simt::shared_base();
  WeightGradientLoader<Image, Compute, VECTOR, WIDE, Tile> loader(p, pipeline, first_column, first_k, first_row);
  SIMT_UNROLL for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < steps) {
      loader.start(stage);
      loader.finish(stage);
    }
    simt::copy_commit();
  }
  const int warp = simt::thread_index() / 32, lane = simt::thread_index() % 32;
  const int warp_row = warp / WARPS_A_ROW * Tile::WARP_M, warp_column = warp % WARPS_A_ROW * Tile::WARP_N;
  float sums[Tile::WARP_M / 16][Tile::WARP_N / 8][4] = {};
  int reading = 0, writing = STAGES - 1;
  for (int step = 0; step < steps; step++) {
    simt::copy_wait<STAGES - 2>();
    simt::sync_threads();
    const bool has_more = step + STAGES - 1 < steps;
    if (has_more) loader.start(writing);
    simt::copy_commit();
    multiply_transposed<Compute, Tile>(pipeline + reading * Tile::STAGE_BYTES, warp_row, warp_column, sums);
    if (has_more) loader.finish(writing);
    reading = reading + 1 == STAGES ? 0 : reading + 1;
    writing = writing + 1 == STAGES ? 0 : writing + 1;
  }
  simt::copy_wait<0>();

  float* part = p.parts + static_cast<int64_t>(simt::block_y()) * f.width * f.k_padded;
  SIMT_UNROLL for (int i = 0; i < Tile::WARP_M / 16; i++) {
    SIMT_UNROLL for (int j = 0; j < Tile::WARP_N / 8; j++) {
      SIMT_UNROLL for (int half = 0; half < 2; half++) {
        const int column = first_column + warp_row + i * 16 + half * 8 + lane / 4;
        const int k = first_k + warp_column + j * 8 + lane % 4 * 2;
        if (column >= f.width || k >= f.k_padded) continue;
        const float* pair = sums[i][j] + half * 2;
        simt::store_global<2>(part + static_cast<int64_t>(column) * f.k_padded + k,
                              {{simt::bits(pair[0]), simt::bits(pair[1])}});
      }
    }
  }
}

using SmallWeightGradientTile = WeightGradientTile<64, 64, 32, 32, 32, 3, 2>;

template <class Image, class Compute>
void launch_weight_gradient(const WeightGradient& p, simt::Stream& stream) {
  using Tile = SmallWeightGradientTile;
  const int tiles = simt::blocks_for(p.forward.width, Tile::BM) * simt::blocks_for(p.forward.k_padded, Tile::BN);
  const int splits = simt::blocks_for(static_cast<int64_t>(p.forward.batch) * p.forward.kept, p.rows_per_split);
  const int vector = pixel_vector(p.forward, sizeof(Image));
  const bool is_wide = p.forward.width % EIGHT == 0 && is_aligned(p.grad);
  const auto kernel = vector == 8   ? (is_wide ? patch_embed_weight_gradient<Image, Compute, 8, true, Tile>
                                               : patch_embed_weight_gradient<Image, Compute, 8, false, Tile>)
                      : vector == 2 ? (is_wide ? patch_embed_weight_gradient<Image, Compute, 2, true, Tile>
                                               : patch_embed_weight_gradient<Image, Compute, 2, false, Tile>)
                                    : (is_wide ? patch_embed_weight_gradient<Image, Compute, 1, true, Tile>
                                               : patch_embed_weight_gradient<Image, Compute, 1, false, Tile>);
  stream.launch(kernel, tiles, splits, Tile::THREADS, Tile::SHARED_BYTES, p);
}

}  // namespace fastvit
