// patch_embed, forward, by clusters of blocks that stay: the steps of all tiles of a block are one stream, so that a
// tile's first steps are being loaded while the sums of the tile before are finished. The blocks of a cluster multiply
// tiles of the same columns at the same time, and each loads a share of their weights for all.
#pragma once

#include "patch_embed_forward.h"

namespace fastvit {

constexpr int CLUSTER = 2;  // blocks

// Loads are always under way, so that slabs lie behind the pipeline. Origins are those of the tile that is loaded and,
// as long as its sums are not finished, of the one before. A stage has two mbarriers: its weights have come, and all
// blocks of the cluster have done with what they replace.
template <class Tile>
struct StreamMemory {
  static constexpr int SLABS = Tile::PIPELINE_BYTES, ORIGINS = SLABS + Tile::THREADS / 32 * SLAB_BYTES;
  static constexpr int ORIGINS_BYTES = Tile::BM * 8, MBARRIERS = ORIGINS + 2 * ORIGINS_BYTES;
  static constexpr int BYTES = MBARRIERS + Tile::STAGES * 16;
  static SIMT_DEVICE shared_address origins(int which) { return simt::shared_base() + ORIGINS + which * ORIGINS_BYTES; }

  // Of the stage of a step, counted over all tiles, whose phase is the same of both.
  static SIMT_DEVICE shared_address full(int step) { return simt::shared_base() + MBARRIERS + step % Tile::STAGES * 16; }
  static SIMT_DEVICE shared_address empty(int step) { return full(step) + 8; }
  static SIMT_DEVICE int parity(int step) { return step / Tile::STAGES & 1; }

  static SIMT_DEVICE void start_mbarriers() {
    for (int stage = 0; stage < Tile::STAGES; stage++) {
      simt::mbarrier_init(full(stage), 1);
      simt::mbarrier_init(empty(stage), CLUSTER);
    }
    simt::mbarrier_publish();
  }
};

// Tiles are numbered so that those side by side, which are multiplied at the same time, share their patches. A cluster
// has as many of the same columns, one below the other, as it has blocks, and goes from there to those as many further
// as there are clusters. Where the last have no rows left, their patches are none.
template <class Tile>
struct TileOrder {
  int count, tiles_n, clusters;

  SIMT_DEVICE TileOrder(int rows, int width, int clusters)
      : tiles_n((width + Tile::BN - 1) / Tile::BN), clusters(clusters) {
    count = (rows + CLUSTER * Tile::BM - 1) / (CLUSTER * Tile::BM) * tiles_n;
  }
  SIMT_DEVICE int first_row(int tile) const { return (tile / tiles_n * CLUSTER + simt::cluster_rank()) * Tile::BM; }
  SIMT_DEVICE int column(int tile) const { return tile % tiles_n; }
};

// Origins of the next tile are noted with the last loads of a tile. By then those of the tile before are finished with
// if a tile has more steps than are loaded ahead; a cluster of shorter ones has one alone.
template <class Image, int VECTOR, class Tile>
struct StreamLoader : PixelLoader<Image, VECTOR, Tile> {
  using Base = PixelLoader<Image, VECTOR, Tile>;
  using Memory = StreamMemory<Tile>;
  static constexpr int WEIGHT_BYTES = Tile::BN * Tile::ROW_BYTES, SHARE = WEIGHT_BYTES / CLUSTER;
  static_assert(Tile::BN == WEIGHT_TILE_ROWS && Tile::BK == WEIGHT_TILE_VALUES, "tiles of weights are a stage's");
  const void* weight;
  const TileOrder<Tile>& order;
  int tile, steps;        // of each tile
  int step = 0, all = 0;  // that have been loaded, of the tile and of all

  SIMT_DEVICE StreamLoader(const PatchEmbed& p, const TileOrder<Tile>& order, int tile, int steps)
      : Base(p.pixels, Memory::origins(0)), weight(p.weight), order(order), tile(tile), steps(steps) {}

  // Behind a barrier of the block, so that all of it have done with what lay in the stage.
  SIMT_DEVICE void start(shared_address stage) {
    if (step + 1 == steps && tile + order.clusters < order.count) {
      note_origins<Tile>(this->p, other_origins(), order.first_row(tile + order.clusters));
    }
    if (simt::thread_index() < CLUSTER) simt::mbarrier_arrive(Memory::empty(all), simt::thread_index());
    Base::start(stage);
  }

  // The product before is under way while a thread waits for the other block.
  SIMT_DEVICE void finish(shared_address stage) {
    Base::finish(stage);
    if (simt::thread_index() == 0) load_weight(stage + Tile::FIRST_BYTES);
    all++;
    if (++step == steps) go_on();
  }

  // Of the tile after the one that is loaded, or before it.
  SIMT_DEVICE shared_address other_origins() const { return Memory::origins(0) + Memory::origins(1) - this->origins; }

  SIMT_DEVICE void await(int reading) const { simt::mbarrier_wait(Memory::full(reading), Memory::parity(reading)); }

 private:
  // This block's share, for all of the cluster.
  SIMT_DEVICE void load_weight(shared_address to) const {
    const int share = simt::cluster_rank() * SHARE;
    const int64_t offset = static_cast<int64_t>(order.column(tile) * steps + step) * WEIGHT_BYTES + share;
    simt::mbarrier_wait(Memory::empty(all), Memory::parity(all));
    simt::mbarrier_expect(Memory::full(all), WEIGHT_BYTES);
    simt::copy_bulk(to + share, static_cast<const unsigned char*>(weight) + offset, SHARE, Memory::full(all),
                    (1 << CLUSTER) - 1);
  }

  SIMT_DEVICE void go_on() {
    step = 0;
    tile += order.clusters;
    this->origins = other_origins();
    this->rewind();
  }
};

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Tile::THREADS, Tile::BLOCKS)
patch_embed_forward_stream(PatchEmbed p) {
  using Memory = StreamMemory<Tile>;
  const bool is_wide = p.width % EIGHT == 0 && is_aligned(p.tokens);
  int tile = simt::block_x() / CLUSTER;
  const TileOrder<Tile> prefix(p.pixels.batch * p.prefix_rows, p.width, 0);
  if (tile < prefix.count) {
    return copy_prefix_tile<Tile>(p, prefix.first_row(tile), prefix.column(tile) * Tile::BN, is_wide);
  }

  tile -= prefix.count;
  const TileOrder<Tile> order(p.pixels.rows(), p.width, simt::grid_x() / CLUSTER - prefix.count);
  const int turns = (order.count - tile + order.clusters - 1) / order.clusters;
  const int steps = (p.pixels.k_length + Tile::BK - 1) / Tile::BK;
  note_origins<Tile>(p.pixels, Memory::origins(0), order.first_row(tile));
  if (simt::thread_index() == 0) Memory::start_mbarriers();
  simt::sync_cluster();
  using Loader = StreamLoader<Image, VECTOR, Tile>;
  Loader loader(p, order, tile, steps);
  Pipeline<Tile, Loader, Product> pipeline(simt::shared_base(), turns * steps, loader);
  while (pipeline.step < pipeline.steps) {
    Product product;
    pipeline.multiply(pipeline.step + steps, product);
    tile = loader.tile - order.clusters;  // the loader has gone on, and no further than to the next
    finish_tile<Tile>(product.sums, simt::shared_base() + Memory::SLABS, loader.other_origins(),
                      Tokens{p, order.first_row(tile), order.column(tile) * Tile::BN, is_wide});
  }
  simt::sync_cluster();  // a block that has ended has no shared memory to copy to
}

}  // namespace fastvit
