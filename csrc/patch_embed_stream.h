// patch_embed, forward, by clusters of blocks that stay, whose warpgroups have roles. One, the producers, loads the steps
// of all tiles of the block in one stream; the others, the consumers, multiply them and finish tiles. So a tile's first
// steps are loaded while the sums of the tile before are finished, and consumers wait for loads alone, neither for one
// another nor for the fence behind what is written. The blocks of a cluster multiply tiles of the same columns at the
// same time, and each loads a share of their weights for all.
//
// Producers are a warpgroup rather than a warp, since pixels pass through threads: scattered patches and values to be
// converted are nothing for a bulk copy. Counted in the machine code for sm_90a, a warp of producers has 259, 482 and 571
// instructions a step (bfloat16, uint8 and float32 images; bfloat16 products) and one of consumers 64, which makes 451,
// 674 and 763 to issue for each quarter of a multiprocessor, whose tensor cores take 1152 cycles for the step. A warp
// alone would have four times a producer's to issue, 1036 to 2284.
#pragma once

#include "patch_embed_forward.h"

namespace fastvit {

constexpr int CLUSTER = 2;      // blocks
constexpr int PRODUCERS = 128;  // threads, behind those of the tile, which are the consumers

// Registers of a thread. Of consumers 96 are sums; in the 128 that a launch gives each, nvcc has to spill.
template <class Tile>
struct Roles {
  static constexpr int THREADS = Tile::THREADS + PRODUCERS;
  static constexpr int PRODUCER_REGISTERS = 104, CONSUMER_REGISTERS = 136;
  static_assert(PRODUCERS * PRODUCER_REGISTERS + Tile::THREADS * CONSUMER_REGISTERS <=
                    THREADS * simt::REGISTERS_AT_LAUNCH<THREADS>, "what one role takes the other must leave");
};

// Loads are always under way, so that slabs lie behind the pipeline. Origins are those of the tile that is loaded. A
// stage has two mbarriers. Full: each warp of producers has written its pixels, and the weights have come. Empty: each
// warp of consumers, of all blocks as weights go to all, has done with what the stage held.
template <class Tile>
struct StreamMemory {
  static constexpr int SLABS = Tile::PIPELINE_BYTES, ORIGINS = SLABS + Tile::THREADS / 32 * SLAB_BYTES;
  static constexpr int MBARRIERS = ORIGINS + Tile::BM * 8;
  static constexpr int BYTES = MBARRIERS + Tile::STAGES * 16;
  static constexpr int FILLING = PRODUCERS / 32 + 1, EMPTYING = CLUSTER * Tile::THREADS / 32;  // arrivals

  // Of the stage of a step, counted over all tiles, whose phase is the same of both.
  static SIMT_DEVICE shared_address stage(uint32_t step) {
    return simt::shared_base() + step % Tile::STAGES * Tile::STAGE_BYTES;
  }
  static SIMT_DEVICE shared_address full(uint32_t step) {
    return simt::shared_base() + MBARRIERS + step % Tile::STAGES * 16;
  }
  static SIMT_DEVICE shared_address empty(uint32_t step) { return full(step) + 8; }
  static SIMT_DEVICE int parity(uint32_t step) { return step / Tile::STAGES & 1; }

  static SIMT_DEVICE void start_mbarriers() {
    for (int stage = 0; stage < Tile::STAGES; stage++) {
      simt::mbarrier_init(full(stage), FILLING);
      simt::mbarrier_init(empty(stage), EMPTYING);
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

// The pixels of a thread of producers: the same piece of every ROWS-th row of a tile. A warp notes the origins of its
// rows for its threads: for each to keep those of its own takes 24 registers, which float32 images do not leave.
template <class Image, int VECTOR, class Tile>
struct StreamPixels {
  static constexpr int PIECES = Tile::BK / VECTOR, ROWS = PRODUCERS / PIECES, PASSES = Tile::BM / ROWS;
  static_assert(ROWS % 8 == 0, "the swizzle must not change from pass to pass");
  static_assert(ROWS * PASSES == Tile::BM, "tiles are whole passes");
  // Pieces that a thread has in registers at once: all of a step's, or of float32, of which each takes eight, half of
  // them, which keeps 24 KiB of a multiprocessor's loads under way.
  static constexpr int HELD = sizeof(Image) == 4 ? PASSES / 2 : PASSES;
  using Copier = PixelCopier<Image, typename Tile::Compute, VECTOR, HELD>;
  const Patches& p;
  const TileOrder<Tile>& order;
  int tile, steps;  // that is loaded, and of each tile
  int step = 0;     // of the tile
  int row, k;
  uint32_t place;
  PixelWalk walk;
  Copier pixels;

  SIMT_DEVICE StreamPixels(const Patches& p, const TileOrder<Tile>& order, int tile, int steps, int thread)
      : p(p), order(order), tile(tile), steps(steps), row(thread / PIECES) {
    place = swizzled<Tile::ROW_BYTES>(row, thread % PIECES * VECTOR * Tile::SIZE);
    begin_tile();
  }

  // To the next step. Behind the last tile there are no patches.
  SIMT_DEVICE void go_on() {
    k += Tile::BK;
    walk.advance(p);
    if (++step < steps) return;
    tile += order.clusters;
    begin_tile();
  }

  // Copies of the step, to the stage; or, of pixels to be converted, loads of what registers hold of it.
  SIMT_DEVICE void load(shared_address stage) {
    const int64_t offset = walk.offset(p.strides());
    SIMT_UNROLL for (int pass = 0; pass < HELD; pass++) start(pass, offset, to(stage, pass));
  }

  // Converts the step, and loads what comes next as soon as registers are free: so loads are always under way.
  SIMT_DEVICE void convert_and_load(shared_address stage) {
    const auto normaliser = Copier::normaliser_of(p, k);
    int64_t offset = walk.offset(p.strides());
    SIMT_UNROLL for (int pass = 0; pass < PASSES; pass++) {
      if (pass == PASSES - HELD) {
        go_on();
        offset = walk.offset(p.strides());
      }
      pixels.finish(pass % HELD, normaliser, to(stage, pass));
      start((pass + HELD) % PASSES, offset, 0);
    }
  }

 private:
  SIMT_DEVICE void begin_tile() {
    step = 0, k = simt::thread_index() % PIECES * VECTOR;
    walk.start(p, k);
    constexpr int ROWS_A_PASS = 32 / PIECES;  // of a warp
    const int lane = simt::thread_index() % 32, first_row = order.first_row(tile);
    // The tile before is loaded.
    simt::sync_warp();
    for (int i = lane; i < PASSES * ROWS_A_PASS; i += 32) {
      const int noted = row - lane / PIECES + i / ROWS_A_PASS * ROWS + i % ROWS_A_PASS;
      store_origin(origins(), noted, patch_origin(p, first_row + noted));
    }
    // This one can be.
    simt::sync_warp();
  }

  static SIMT_DEVICE shared_address origins() { return simt::shared_base() + StreamMemory<Tile>::ORIGINS; }

  SIMT_DEVICE shared_address to(shared_address stage, int pass) const {
    return stage + place + pass * ROWS * Tile::ROW_BYTES;
  }

  SIMT_DEVICE void start(int pass, int64_t offset, shared_address to) {
    pixels.start(p, walk, p.strides(), offset, k, load_origin(origins(), row + pass * ROWS), pass % HELD, to);
  }
};

// Fills stages as soon as they are empty. A thread hands over what it has written: pixels of the compute type some steps
// after their copies have been started, converted ones at once.
template <class Image, int VECTOR, class Tile>
struct Producer {
  using Memory = StreamMemory<Tile>;
  using Pixels = StreamPixels<Image, VECTOR, Tile>;
  static constexpr int WEIGHT_BYTES = Tile::BN * Tile::ROW_BYTES, SHARE = WEIGHT_BYTES / CLUSTER;
  static_assert(Tile::BN == WEIGHT_TILE_ROWS && Tile::BK == WEIGHT_TILE_VALUES, "tiles of weights are a stage's");
  // Steps whose copies may be in flight when a step is handed over. The stage of the last of them becomes empty as the
  // product before that of the step begins; with one more it would be as that ends, and tensor cores would wait.
  static constexpr int AHEAD = Tile::STAGES - 2;
  const void* weight;
  const TileOrder<Tile>& order;
  int tile, steps, thread;
  int step = 0;  // of the tile, whose weights are loaded
  Pixels pixels;

  SIMT_DEVICE Producer(const PatchEmbed& p, const TileOrder<Tile>& order, int tile, int steps)
      : weight(p.weight), order(order), tile(tile), steps(steps), thread(simt::thread_index() - Tile::THREADS),
        pixels(p.pixels, order, tile, steps, thread) {}

  // So many steps, of all tiles.
  SIMT_DEVICE void run(int all) {
    if constexpr (!Pixels::Copier::ASYNC) pixels.load(0);
    for (int i = 0; i < all; i++) {
      simt::mbarrier_wait(Memory::empty(i), !Memory::parity(i));  // of no phase before the first, which has ended
      if (thread == 0) load_weight(i);
      if (++step == steps) step = 0, tile += order.clusters;
      if constexpr (Pixels::Copier::ASYNC) {
        pixels.load(Memory::stage(i));
        simt::copy_commit();
        pixels.go_on();
        if (i >= AHEAD) hand_over_copied<AHEAD>(i - AHEAD);
      } else {
        pixels.convert_and_load(Memory::stage(i));
        hand_over(i);
      }
    }
    if constexpr (Pixels::Copier::ASYNC) {
      for (int i = all > AHEAD ? all - AHEAD : 0; i < all; i++) hand_over_copied<0>(i);
    }
  }

 private:
  // This block's share, for all of the cluster.
  SIMT_DEVICE void load_weight(int i) const {
    const int share = simt::cluster_rank() * SHARE;
    const int64_t offset = static_cast<int64_t>(order.column(tile) * steps + step) * WEIGHT_BYTES + share;
    simt::mbarrier_expect(Memory::full(i), WEIGHT_BYTES);
    simt::copy_bulk(Memory::stage(i) + Tile::FIRST_BYTES + share, static_cast<const unsigned char*>(weight) + offset,
                    SHARE, Memory::full(i), (1 << CLUSTER) - 1);
  }

  template <int PENDING>
  static SIMT_DEVICE void hand_over_copied(int i) {
    simt::copy_wait<PENDING>();
    hand_over(i);
  }

  // Of the warp.
  static SIMT_DEVICE void hand_over(int i) {
    simt::publish_shared();
    simt::sync_warp();
    if (simt::thread_index() % 32 == 0) simt::mbarrier_arrive(Memory::full(i));
  }
};

// A stage is released when its product is complete, which is when that of the next is under way.
template <class Tile, class Product>
SIMT_DEVICE void consume(const PatchEmbed& p, const TileOrder<Tile>& order, int tile, int steps, bool is_wide) {
  using Memory = StreamMemory<Tile>;
  static_assert(Product::IN_FLIGHT == 1, "the step before the last begun is complete");
  const auto release = [](int i) {
    const int lane = simt::thread_index() % 32;
    if (lane < CLUSTER) simt::mbarrier_arrive(Memory::empty(i), lane);
  };
  for (int i = 0; tile < order.count; tile += order.clusters) {
    Product product;
    for (int step = 0; step < steps; step++, i++) {
      simt::mbarrier_wait(Memory::full(i), Memory::parity(i));
      product.multiply(Memory::stage(i));
      product.complete();
      if (step > 0) release(i - 1);
    }
    product.finish();
    release(i - 1);
    finish_tile<Tile>(product.sums, simt::shared_base() + Memory::SLABS,
                      Tokens<false>{p, order.first_row(tile), order.column(tile) * Tile::BN, is_wide});
  }
}

template <class Image, int VECTOR, class Tile, class Product>
SIMT_KERNEL(Roles<Tile>::THREADS, Tile::BLOCKS)
patch_embed_forward_stream(PatchEmbed p) {
  using Role = Roles<Tile>;
  const bool is_wide = p.width % EIGHT == 0 && is_aligned(p.tokens);
  int tile = simt::block_x() / CLUSTER;
  const TileOrder<Tile> prefix(p.pixels.batch * p.prefix_rows, p.width, 0);
  if (tile < prefix.count) {
    return copy_prefix_tile<Tile, Role::THREADS>(p, prefix.first_row(tile), prefix.column(tile) * Tile::BN, is_wide);
  }

  tile -= prefix.count;
  const TileOrder<Tile> order(p.pixels.rows(), p.width, simt::grid_x() / CLUSTER - prefix.count);
  const int turns = (order.count - tile + order.clusters - 1) / order.clusters;
  const int steps = (p.pixels.k_length + Tile::BK - 1) / Tile::BK;
  if (simt::thread_index() == 0) StreamMemory<Tile>::start_mbarriers();
  simt::sync_cluster();
  if (simt::thread_index() >= Tile::THREADS) {
    simt::release_registers<Role::PRODUCER_REGISTERS>();
    Producer<Image, VECTOR, Tile>(p, order, tile, steps).run(turns * steps);
  } else {
    simt::request_registers<Role::CONSUMER_REGISTERS>();
    consume<Tile, Product>(p, order, tile, steps, is_wide);
  }
  // A block that has ended has no shared memory to reach into.
  simt::sync_cluster();
}

}  // namespace fastvit
