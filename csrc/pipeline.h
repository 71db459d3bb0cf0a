// What the three products share: tiles, their place in shared memory, and the loop that loads some steps ahead.
#pragma once

#include "numeric.h"

namespace fastvit {

using simt::shared_address;

// Byte offset of a byte in a row of a tile. The 16-byte chunks of a row change places with the row, so that what is read
// at once lies in different banks: a chunk of each of eight rows (ldmatrix, float32 by rows), or, of float32 by columns,
// two chunks of each of four.
template <int ROW_BYTES, bool FOUR_ROWS = false>
SIMT_DEVICE uint32_t swizzled(int row, int byte) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128 || ROW_BYTES == 256, "rows of 64, 128 or 256 bytes");
  const int phase = FOUR_ROWS ? (row & 3) << 1 : ROW_BYTES == 64 ? row >> 1 & 3 : row & 7;
  return row * ROW_BYTES + (((byte >> 4) ^ phase) << 4) + (byte & 15);
}

// A block computes BM rows by BN columns, BK values of the reduction a step; a warp WARP_M by WARP_N of them. Both
// operands lie in shared memory as [rows, BK] values, STAGES steps of them; a multiprocessor is to hold BLOCKS blocks.
template <class Compute_, int BM_, int BN_, int BK_, int WARP_M_, int WARP_N_, int STAGES_, int BLOCKS_>
struct Tile {
  using Compute = Compute_;
  static constexpr int BM = BM_, BN = BN_, BK = BK_, WARP_M = WARP_M_, WARP_N = WARP_N_, STAGES = STAGES_;
  static constexpr int BLOCKS = BLOCKS_, WARPS_A_ROW = BN / WARP_N, THREADS = BM / WARP_M * WARPS_A_ROW * 32;
  static constexpr int SIZE = sizeof(Compute), ROW_BYTES = BK * SIZE;
  static constexpr int FIRST_BYTES = BM * ROW_BYTES, STAGE_BYTES = FIRST_BYTES + BN * ROW_BYTES;
  static constexpr int PIPELINE_BYTES = STAGES * STAGE_BYTES;

  // The same memory as [BK, BM] and [BK, BN] values, for products whose reduction runs over rows. Warpgroups, of which
  // every warp spans the tile's columns, have them in panels of 128 bytes a row, one behind the other.
  static constexpr bool BY_WARPGROUPS = WARP_M == 16 && WARP_N == BN;
  static constexpr int FIRST_COLUMNS = BM * SIZE, SECOND_COLUMNS = BN * SIZE;  // bytes of a row
  static constexpr int PANEL_BYTES = BK * 128;
  static SIMT_DEVICE uint32_t first_place(int row, int byte) { return place<FIRST_COLUMNS>(row, byte); }
  static SIMT_DEVICE uint32_t second_place(int row, int byte) { return FIRST_BYTES + place<SECOND_COLUMNS>(row, byte); }

  static SIMT_DEVICE int warp_row() { return simt::thread_index() / 32 / WARPS_A_ROW * WARP_M; }
  static SIMT_DEVICE int warp_column() { return simt::thread_index() / 32 % WARPS_A_ROW * WARP_N; }

 private:
  template <int COLUMNS>
  static SIMT_DEVICE uint32_t place(int row, int byte) {
    if constexpr (BY_WARPGROUPS) {
      return byte / 128 * PANEL_BYTES + swizzled<128>(row, byte % 128);
    } else {
      return swizzled<COLUMNS, SIZE == 4>(row, byte);
    }
  }
};

// A warp's sums, as the fragments of mma.sync: of each 16 by 8 values, with g = lane / 4 and t = 2 (lane % 4), a lane
// has rows g and g + 8, columns t and t + 1.
template <class Tile>
using Sums = float[Tile::WARP_M / 16][Tile::WARP_N / 8][4];

// A product of `steps` stages, by threads that both load and multiply. A loader starts a step's loads, and finishes
// those that pass through registers once the product before it is under way. A product multiplies one stage and
// completes all but IN_FLIGHT of those it has begun, so that the place written behind the next barrier is free. Behind
// the last the memory of all stages is.
template <class Tile, class Loader, class Product>
SIMT_DEVICE void run_pipeline(shared_address stages, int steps, Loader& loader, Product& product) {
  constexpr int STAGES = Tile::STAGES, AHEAD = STAGES - 1 - Product::IN_FLIGHT;
  static_assert(AHEAD > 0, "loads go on while a stage is multiplied");
  const auto place = [&](int stage) { return stages + stage * Tile::STAGE_BYTES; };
  SIMT_UNROLL for (int stage = 0; stage < AHEAD; stage++) {
    if (stage < steps) {
      loader.start(place(stage));
      loader.finish(place(stage));
    }
    simt::copy_commit();
  }
  int reading = 0, writing = AHEAD;
  for (int step = 0; step < steps; step++) {
    simt::copy_wait<AHEAD - 1>();
    Product::publish();
    simt::sync_threads();
    const bool has_more = step + AHEAD < steps;
    if (has_more) loader.start(place(writing));
    simt::copy_commit();
    product.multiply(place(reading));
    if (has_more) loader.finish(place(writing));
    product.complete();
    reading = reading + 1 == STAGES ? 0 : reading + 1;
    writing = writing + 1 == STAGES ? 0 : writing + 1;
  }
  product.finish();
  simt::copy_wait<0>();
  simt::sync_threads();
}

}  // namespace fastvit
