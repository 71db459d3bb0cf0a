// patch_embed, backward: the gradient of the weight, from patches that are rebuilt on the way.
//
// parts[s, d, k] = sum over the rows m of split s of grad[m, d] * pixel(m, k). A block computes a tile of BM columns of
// the gradient by BN values of k, BK rows m at a time. Rows lie in shared memory as they lie in the images, so that
// both operands of the product are read transposed. Splits are added in a second pass, always in the same order.
#pragma once

#include "patches.h"
#include "products.h"

namespace fastvit {

// Behind the pipeline, for the rows of as many steps: the origin of each row's patch, the row of its token, and of packed
// images its strides. They are found by one thread each, a step ahead, rather than by every thread that loads from the
// row.
template <class Tile, bool PACKED = false>
struct WeightGradientMemory {
  static constexpr int ROW_BYTES = PACKED ? 32 : 16, ROWS = Tile::PIPELINE_BYTES;
  static constexpr int BYTES = ROWS + Tile::STAGES * Tile::BK * ROW_BYTES;
};

// The share of one thread in the loads of a step: some rows m, each a piece of the gradient and a piece of the pixels.
template <class Image, int VECTOR, class Tile, bool PACKED>
struct WeightGradientLoader {
  using Compute = typename Tile::Compute;
  using Memory = WeightGradientMemory<Tile, PACKED>;
  static constexpr int SIZE = Tile::SIZE;
  static constexpr int PIECE = VECTOR * SIZE < 4 ? 4 / SIZE : VECTOR;
  static constexpr int PIECES = Tile::BN / PIECE, ROWS = Tile::THREADS / PIECES, PASSES = Tile::BK / ROWS;
  static_assert(ROWS * PASSES == Tile::BK, "steps are whole passes");
  static_assert(Tile::THREADS >= Tile::BK, "a thread for every row of a step");

  const WeightGradient& p;
  shared_address rows_memory;
  int first_column, pixel_row, pixel_column, pixel_k;
  int row;       // the first of the next step
  int slot = 0;  // where its rows are noted
  int steps_noted = Tile::STAGES;
  bool is_wide;
  PixelWalk walk;
  PixelCopier<Image, Compute, VECTOR, PASSES> pixels;

  // The rows of the first steps are noted when all threads have passed a barrier.
  SIMT_DEVICE WeightGradientLoader(const WeightGradient& p, shared_address memory, int first_column, int first_k,
                                   int first_row)
      : p(p), rows_memory(memory + Memory::ROWS), first_column(first_column), row(first_row) {
    const int thread = simt::thread_index();
    pixel_row = thread / PIECES, pixel_column = thread % PIECES * PIECE, pixel_k = first_k + pixel_column;
    is_wide = p.width % EIGHT == 0 && is_aligned(p.grad);
    walk.start(p.pixels, pixel_k < p.pixels.k_length ? pixel_k : 0);
    for (int i = thread; i < Tile::STAGES * Tile::BK; i += Tile::THREADS) note_row(i, first_row + i);
  }

  SIMT_DEVICE void start(shared_address stage) {
    note_ahead();
    if (Tile::BM >= 128 || is_wide) {  // large tiles are for wide gradients alone: is_large
      load_grad<16 / SIZE>(stage);
    } else {
      load_grad<4 / SIZE>(stage);
    }
    const Strides strides = p.pixels.strides();
    const int64_t offset = walk.offset(strides);
    SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
      const int tile_row = pixel_row + pass * ROWS;
      const int64_t origin = noted(tile_row, 0);
      if constexpr (PACKED) {
        const auto words = simt::load_shared<2>(place_of(tile_row) + 16);
        const Strides own{static_cast<int>(words.word[0]), static_cast<int>(words.word[1])};
        pixels.start(p.pixels, walk, own, walk.offset(own), pixel_k, origin, pass, pixel_place(stage, pass));
      } else {
        pixels.start(p.pixels, walk, strides, offset, pixel_k, origin, pass, pixel_place(stage, pass));
      }
    }
    row += Tile::BK;
    slot = next_slot();
  }

  SIMT_DEVICE void finish(shared_address stage) {
    pixels.finish(p.pixels, pixel_k, [&](int pass) { return pixel_place(stage, pass); });
  }

 private:
  SIMT_DEVICE int next_slot() const { return slot + 1 == Tile::STAGES ? 0 : slot + 1; }

  // A split is whole steps, so that rows behind its last are those of the next split, or of nobody.
  SIMT_DEVICE void note_row(int index, int m) {
    PackedPlace place{};
    int64_t token_of_row = 0;
    if constexpr (PACKED) {
      place = packed_place(p.pixels, m);
      if (place.origin >= 0) token_of_row = load_token(p.pixels.packed.tokens + m).token;
    } else {
      place.origin = patch_origin(p.pixels, m), token_of_row = token_row(p.pixels, p.prefix_rows, m);
    }
    const auto origin = static_cast<uint64_t>(place.origin), token = static_cast<uint64_t>(token_of_row);
    const shared_address at = rows_memory + index * Memory::ROW_BYTES;
    simt::store_shared<4>(at, {{static_cast<uint32_t>(origin), static_cast<uint32_t>(origin >> 32),
                                static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32)}});
    if constexpr (PACKED) {
      simt::store_shared<2>(at + 16, {{static_cast<uint32_t>(place.plane_stride),
                                       static_cast<uint32_t>(place.row_stride)}});
    }
  }

  // Notes the rows of the step after the next: a barrier stands between this and their use, and between the last use of
  // their place and this.
  SIMT_DEVICE void note_ahead() {
    if (steps_noted > 1) {
      steps_noted--;
    } else if (simt::thread_index() < Tile::BK) {
      note_row(next_slot() * Tile::BK + simt::thread_index(), row + Tile::BK + simt::thread_index());
    }
  }

  // Of a row of the next step, the origin of its patch (0) or the row of its token (1).
  SIMT_DEVICE int64_t noted(int tile_row, int which) const { return load_wide(place_of(tile_row) + which * 8); }

  SIMT_DEVICE shared_address place_of(int tile_row) const {
    return rows_memory + (slot * Tile::BK + tile_row) * Memory::ROW_BYTES;
  }

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
      const bool is_inside = column < p.width && noted(tile_row, 0) >= 0;
      const Compute* from = static_cast<const Compute*>(p.grad);
      if (is_inside) from += noted(tile_row, 1) * p.width + column;
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

template <class Image, int VECTOR, class Tile, class Product, bool PACKED = false>
SIMT_DEVICE void sum_products(const WeightGradient& p) {
  const int k_padded = p.pixels.k_padded, tiles_k = (k_padded + Tile::BN - 1) / Tile::BN;
  const int first_column = simt::block_x() / tiles_k * Tile::BM, first_k = simt::block_x() % tiles_k * Tile::BN;
  const int first_row = simt::block_y() * p.rows_per_split, rows = patch_rows<PACKED>(p.pixels) - first_row;
  const int steps = ((rows < p.rows_per_split ? rows : p.rows_per_split) + Tile::BK - 1) / Tile::BK;

  const shared_address memory = simt::shared_base();
  WeightGradientLoader<Image, VECTOR, Tile, PACKED> loader(p, memory, first_column, first_k, first_row);
  simt::sync_threads();
  Product product;
  run_pipeline<Tile>(memory, steps, loader, product);

  const int lane = simt::thread_index() % 32;
  float* part = p.parts + static_cast<int64_t>(simt::block_y()) * p.width * k_padded;
  SIMT_UNROLL for (int i = 0; i < Tile::WARP_M / 16; i++) {
    SIMT_UNROLL for (int j = 0; j < Tile::WARP_N / 8; j++) {
      SIMT_UNROLL for (int pair_row = 0; pair_row < 2; pair_row++) {
        const int column = first_column + Tile::warp_row() + i * 16 + pair_row * 8 + lane / 4;
        const int k = first_k + Tile::warp_column() + j * 8 + lane % 4 * 2;
        if (column >= p.width || k >= k_padded) continue;
        const float* pair = product.sums[i][j] + pair_row * 2;
        simt::store_global<2>(part + static_cast<int64_t>(column) * k_padded + k,
                              {{simt::bits(pair[0]), simt::bits(pair[1])}});
      }
    }
  }
}

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_weight_gradient(WeightGradient p) {
  sum_products<Image, VECTOR, Tile, Product>(p);
}

}  // namespace fastvit
