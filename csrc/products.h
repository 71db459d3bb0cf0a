// How a stage is multiplied: by tensor cores, by a warpgroup's, or by plain fused multiply-adds.
//
// ByRows: both operands are rows of consecutive values of the reduction. ByColumns: rows are the reduction, so that both
// operands are read transposed. All of them leave the same Sums.
#pragma once

#include "pipeline.h"

namespace fastvit {

// What is the same for those that multiply while the warp waits.
template <class Tile_>
struct Synchronous {
  using Tile = Tile_;
  Sums<Tile> sums = {};
  static constexpr int IN_FLIGHT = 0;
  static SIMT_DEVICE void publish() {}
  SIMT_DEVICE void complete() {}
  SIMT_DEVICE void finish() {}
};

// 16-bit operands, or float32 ones that are rounded to TF32 on the way: 32 bytes of a row a time in either case.
template <class T>
SIMT_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2) {
    simt::multiply_add<T>(sum, a, b0, b1);
  } else {
    simt::multiply_add_tf32(sum, a, b0, b1);
  }
}

template <class T, int COUNT>
SIMT_DEVICE void round_fragments(uint32_t (&fragments)[COUNT]) {
  if constexpr (sizeof(T) == 4) {
    SIMT_UNROLL for (uint32_t& word : fragments) word = simt::round_to_tf32(word);
  }
}

template <class Tile>
struct TensorCoresByRows : Synchronous<Tile> {
  static constexpr int ROWS = Tile::WARP_M / 16, COLUMNS = Tile::WARP_N / 8, ROW_BYTES = Tile::ROW_BYTES;
  uint32_t first, second;  // where the lane reads, from the start of a stage

  SIMT_DEVICE TensorCoresByRows() {
    const int lane = simt::thread_index() % 32;
    first = swizzled<ROW_BYTES>(Tile::warp_row() + lane % 16, lane / 16 * 16);
    second = Tile::FIRST_BYTES + swizzled<ROW_BYTES>(Tile::warp_column() + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16);
  }

  SIMT_DEVICE void multiply(shared_address stage) {
    using T = typename Tile::Compute;
    SIMT_UNROLL for (int byte = 0; byte < ROW_BYTES; byte += 32) {
      // Stepping further along a row only flips bits of the chunk, so the swizzle is computed once.
      const shared_address a_row = (stage + first) ^ byte, b_row = (stage + second) ^ byte;
      uint32_t a[ROWS][4], b[COLUMNS / 2][4];
      SIMT_UNROLL for (int i = 0; i < ROWS; i++) simt::load_matrices(a[i], a_row + i * 16 * ROW_BYTES);
      SIMT_UNROLL for (int j = 0; j < COLUMNS / 2; j++) simt::load_matrices(b[j], b_row + j * 16 * ROW_BYTES);
      SIMT_UNROLL for (int i = 0; i < ROWS; i++) round_fragments<T>(a[i]);
      SIMT_UNROLL for (int j = 0; j < COLUMNS / 2; j++) round_fragments<T>(b[j]);
      SIMT_UNROLL for (int i = 0; i < ROWS; i++) {
        SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
          multiply_fragments<T>(this->sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

// float32 as it is. A lane has the rows and columns that Sums gives it, four values of the reduction at a time.
template <class Tile>
struct MultiplyAddsByRows : Synchronous<Tile> {
  static constexpr int ROWS = Tile::WARP_M / 16, COLUMNS = Tile::WARP_N / 8, ROW_BYTES = Tile::ROW_BYTES;
  uint32_t first, second[2];

  SIMT_DEVICE MultiplyAddsByRows() {
    const int lane = simt::thread_index() % 32, column = Tile::warp_column() + lane % 4 * 2;
    first = swizzled<ROW_BYTES>(Tile::warp_row() + lane / 4, 0);
    SIMT_UNROLL for (int e = 0; e < 2; e++) second[e] = Tile::FIRST_BYTES + swizzled<ROW_BYTES>(column + e, 0);
  }

  SIMT_DEVICE void multiply(shared_address stage) {
    SIMT_UNROLL for (int byte = 0; byte < ROW_BYTES; byte += 16) {
      simt::Vector<4> b[COLUMNS][2];
      SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
        SIMT_UNROLL for (int e = 0; e < 2; e++) {
          b[j][e] = simt::load_shared<4>(((stage + second[e]) ^ byte) + j * 8 * ROW_BYTES);
        }
      }
      SIMT_UNROLL for (int row = 0; row < ROWS * 2; row++) {
        const auto a = simt::load_shared<4>(((stage + first) ^ byte) + row * 8 * ROW_BYTES);
        SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
          SIMT_UNROLL for (int e = 0; e < 2; e++) {
            float& sum = this->sums[row / 2][j][row % 2 * 2 + e];
            SIMT_UNROLL for (int q = 0; q < 4; q++) {
              sum += simt::from_bits(a.word[q]) * simt::from_bits(b[j][e].word[q]);
            }
          }
        }
      }
    }
  }
};

// A warpgroup's tensor cores (sm_90a), which read both operands from shared memory by themselves: the 128-byte swizzle
// of their descriptors is the one of rows of 128 bytes here. A warpgroup has 64 rows of the first operand, or a panel
// of its columns, which are as many bytes. A product goes on over the fence and the barrier behind it, so that they
// keep no tensor core waiting, and is waited for a step later.
template <class Tile, bool BY_COLUMNS>
struct Warpgroup {
  using Compute = typename Tile::Compute;
  static_assert(Tile::BY_WARPGROUPS && Tile::BN == simt::WARPGROUP_COLUMNS && Tile::ROW_BYTES == 128 &&
                    sizeof(Compute) == 2, "m64n192k16 on rows of 128 bytes");
  static constexpr int IN_FLIGHT = 1;
  Sums<Tile> sums = {};

  // What a thread has written becomes visible to the tensor cores before it passes the barrier.
  static SIMT_DEVICE void publish() { simt::publish_shared(); }

  SIMT_DEVICE void multiply(shared_address stage) {
    constexpr int STEP = BY_COLUMNS ? 16 * 128 : 16 * 2;  // bytes from 16 values of the reduction to the next
    const shared_address first = stage + simt::thread_index() / 128 * Tile::PANEL_BYTES;
    simt::warpgroup_arrive();
    // The lowest of a descriptor's bits are its address in units of 16 bytes.
    const uint64_t a = operand(first), b = operand(stage + Tile::FIRST_BYTES);
    SIMT_UNROLL for (int step = 0; step < Tile::BK / 16 * STEP; step += STEP) {
      simt::warpgroup_multiply_add<Compute, BY_COLUMNS>(sums[0], a + step / 16, b + step / 16);
    }
    simt::warpgroup_commit();
  }
  SIMT_DEVICE void complete() { simt::warpgroup_wait<IN_FLIGHT>(sums[0]); }
  SIMT_DEVICE void finish() { simt::warpgroup_wait<0>(sums[0]); }

 private:
  static SIMT_DEVICE uint64_t operand(shared_address start) {
    return BY_COLUMNS ? simt::matrix_descriptor(start, Tile::PANEL_BYTES) : simt::matrix_descriptor(start);
  }
};

template <class Tile>
struct WarpgroupByRows : Warpgroup<Tile, false> {};
template <class Tile>
struct WarpgroupByColumns : Warpgroup<Tile, true> {};

template <class Tile>
struct TensorCoresByColumns : Synchronous<Tile> {
  static constexpr int ROWS = Tile::WARP_M / 16, COLUMNS = Tile::WARP_N / 8;

  SIMT_DEVICE void multiply(shared_address stage) {
    using T = typename Tile::Compute;
    constexpr int DEPTH = 32 / Tile::SIZE;  // of one product
    SIMT_UNROLL for (int depth = 0; depth < Tile::BK; depth += DEPTH) {
      uint32_t a[ROWS][4], b[COLUMNS / 2][4];
      SIMT_UNROLL for (int i = 0; i < ROWS; i++) load_first(a[i], stage, depth, Tile::warp_row() + i * 16);
      SIMT_UNROLL for (int j = 0; j < COLUMNS / 2; j++) load_second(b[j], stage, depth, Tile::warp_column() + j * 16);
      SIMT_UNROLL for (int i = 0; i < ROWS; i++) {
        SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
          multiply_fragments<T>(this->sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

 private:
  // [16 columns, DEPTH] of the first operand
  static SIMT_DEVICE void load_first(uint32_t (&a)[4], shared_address stage, int depth, int column) {
    const int lane = simt::thread_index() % 32;
    if constexpr (Tile::SIZE == 2) {
      const int row = depth + lane / 16 * 8 + lane % 8, byte = (column + lane / 8 % 2 * 8) * 2;
      simt::load_matrices_transposed(a, stage + Tile::first_place(row, byte));
    } else {
      SIMT_UNROLL for (int i = 0; i < 4; i++) {
        const int row = depth + lane % 4 + i / 2 * 4, byte = (column + lane / 4 + i % 2 * 8) * 4;
        a[i] = simt::load_shared<1>(stage + Tile::first_place(row, byte)).word[0];
      }
      round_fragments<float>(a);
    }
  }

  // [DEPTH, 8 columns] of the second operand, twice
  static SIMT_DEVICE void load_second(uint32_t (&b)[4], shared_address stage, int depth, int column) {
    const int lane = simt::thread_index() % 32;
    if constexpr (Tile::SIZE == 2) {
      const int row = depth + lane / 8 % 2 * 8 + lane % 8, byte = (column + lane / 16 * 8) * 2;
      simt::load_matrices_transposed(b, stage + Tile::second_place(row, byte));
    } else {
      SIMT_UNROLL for (int i = 0; i < 4; i++) {
        const int row = depth + lane % 4 + i % 2 * 4, byte = (column + lane / 4 + i / 2 * 8) * 4;
        b[i] = simt::load_shared<1>(stage + Tile::second_place(row, byte)).word[0];
      }
      round_fragments<float>(b);
    }
  }
};

template <class Tile>
struct MultiplyAddsByColumns : Synchronous<Tile> {
  static constexpr int ROWS = Tile::WARP_M / 16, COLUMNS = Tile::WARP_N / 8;

  SIMT_DEVICE void multiply(shared_address stage) {
    const int lane = simt::thread_index() % 32;
    const int first = (Tile::warp_row() + lane / 4) * 4, second = (Tile::warp_column() + lane % 4 * 2) * 4;
    SIMT_UNROLL for (int depth = 0; depth < Tile::BK; depth++) {
      simt::Vector<2> b[COLUMNS];
      SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
        b[j] = simt::load_shared<2>(stage + Tile::second_place(depth, second + j * 32));
      }
      SIMT_UNROLL for (int row = 0; row < ROWS * 2; row++) {
        const auto a = simt::load_shared<1>(stage + Tile::first_place(depth, first + row * 32));
        SIMT_UNROLL for (int j = 0; j < COLUMNS; j++) {
          SIMT_UNROLL for (int e = 0; e < 2; e++) {
            this->sums[row / 2][j][row % 2 * 2 + e] += simt::from_bits(a.word[0]) * simt::from_bits(b[j].word[e]);
          }
        }
      }
    }
  }
};

}  // namespace fastvit
