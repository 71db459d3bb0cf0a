// patch_embed, forward, by blocks that stay: the steps of all tiles of a block are one stream, so that a tile's first
// steps are being loaded while the sums of the tile before are finished.
#pragma once

#include "patch_embed_forward.h"

namespace fastvit {

// Loads are always under way, so that slabs lie behind the pipeline. Origins are those of the tile that is loaded and,
// as long as its sums are not finished, of the one before.
template <class Tile>
struct StreamMemory {
  static constexpr int SLABS = Tile::PIPELINE_BYTES, ORIGINS = SLABS + Tile::THREADS / 32 * SLAB_BYTES;
  static constexpr int ORIGINS_BYTES = Tile::BM * 8, BYTES = ORIGINS + 2 * ORIGINS_BYTES;
  static SIMT_DEVICE shared_address origins(int which) { return simt::shared_base() + ORIGINS + which * ORIGINS_BYTES; }
};

// Tiles are numbered so that those side by side, which are multiplied at the same time, share their patches. A block
// goes from a tile to the one as many further as there are blocks.
template <class Tile>
struct TileOrder {
  int count, tiles_n, blocks;

  SIMT_DEVICE TileOrder(int rows, int width, int blocks)
      : tiles_n((width + Tile::BN - 1) / Tile::BN), blocks(blocks) {
    count = (rows + Tile::BM - 1) / Tile::BM * tiles_n;
  }
  SIMT_DEVICE int first_row(int tile) const { return tile / tiles_n * Tile::BM; }
  SIMT_DEVICE int first_column(int tile) const { return tile % tiles_n * Tile::BN; }
};

// Origins of the next tile are noted with the last loads of a tile. By then those of the tile before are finished with
// if a tile has more steps than are loaded ahead; a block of shorter ones has one alone.
template <class Image, int VECTOR, class Tile>
struct StreamLoader : ForwardLoader<Image, VECTOR, Tile> {
  using Base = ForwardLoader<Image, VECTOR, Tile>;
  const TileOrder<Tile>& order;
  int tile;

  SIMT_DEVICE StreamLoader(const Patches& p, const WeightRows& weight, const TileOrder<Tile>& order, int tile)
      : Base(p, weight, StreamMemory<Tile>::origins(0), order.first_column(tile)), order(order), tile(tile) {}

  SIMT_DEVICE void start(shared_address stage) {
    if (is_last(this->weight_k) && tile + order.blocks < order.count) {
      note_origins<Tile>(this->p, next_origins(), order.first_row(tile + order.blocks));
    }
    Base::start(stage);
    if constexpr (Base::IS_ASYNC) go_on();
  }
  SIMT_DEVICE void finish(shared_address stage) {
    Base::finish(stage);
    if constexpr (!Base::IS_ASYNC) go_on();
  }

 private:
  // Whether the step that a thread loads k of is its tile's last.
  SIMT_DEVICE bool is_last(int k) const { return k / Tile::BK * Tile::BK + Tile::BK >= this->p.k_length; }

  SIMT_DEVICE shared_address next_origins() const {
    return StreamMemory<Tile>::origins(0) + StreamMemory<Tile>::origins(1) - this->origins;
  }

  SIMT_DEVICE void go_on() {
    if (!is_last(this->weight_k - Tile::BK)) return;
    tile += order.blocks;
    this->origins = next_origins();
    this->first_column = order.first_column(tile);
    this->rewind();
  }
};

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_forward_stream(PatchEmbed p) {
  const bool is_wide = p.width % EIGHT == 0 && is_aligned(p.tokens);
  const TileOrder<Tile> prefix(p.pixels.batch * p.prefix_rows, p.width, 0);
  if (simt::block_x() < prefix.count) {
    const int tile = simt::block_x();
    return copy_prefix_tile<Tile>(p, prefix.first_row(tile), prefix.first_column(tile), is_wide);
  }

  const TileOrder<Tile> order(p.pixels.rows(), p.width, simt::grid_x() - prefix.count);
  int tile = simt::block_x() - prefix.count;
  const int turns = (order.count - tile + order.blocks - 1) / order.blocks;
  const int steps = (p.pixels.k_length + Tile::BK - 1) / Tile::BK;
  note_origins<Tile>(p.pixels, StreamMemory<Tile>::origins(0), order.first_row(tile));
  simt::sync_threads();
  using Loader = StreamLoader<Image, VECTOR, Tile>;
  Loader loader(p.pixels, {p.weight, p.width, p.pixels.k_padded}, order, tile);
  Pipeline<Tile, Loader, Product> pipeline(simt::shared_base(), turns * steps, loader);
  for (int turn = 0; tile < order.count; turn ^= 1, tile += order.blocks) {
    Product product;
    pipeline.multiply(pipeline.step + steps, product);
    finish_tile<Tile>(product.sums, simt::shared_base() + StreamMemory<Tile>::SLABS, StreamMemory<Tile>::origins(turn),
                      Tokens{p, order.first_row(tile), order.first_column(tile), is_wide});
  }
}

}  // namespace fastvit
