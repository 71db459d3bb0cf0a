// split_heads, backward: the gradients of all heads' queries, keys and values to one packed gradient; a read and a
// write of each.
//
// A block takes one of the three, of its columns as many as a warp holds, and some rows, which its warps take in turn.
// Values are moved as they are; as for add_norm, types are known at run time. WIDE: a lane has eight columns of a head,
// which are moved 16 bytes at a time; else it has one, which may lie anywhere.
#pragma once

#include "parts.h"

namespace fastvit {

constexpr int HEADS_ROWS = 2;    // of a warp, whose loads are under way together
constexpr int HEADS_BLOCKS = 4;  // that a multiprocessor has registers for

SIMT_BOTH constexpr int heads_columns(bool is_wide) { return 32 * (is_wide ? EIGHT : 1); }  // of a block

template <bool WIDE>
SIMT_KERNEL(PART_THREADS, HEADS_BLOCKS)
split_heads_backward(SplitHeads p) {
  constexpr int COLUMNS = heads_columns(WIDE), COUNT = COLUMNS / 32;
  const int tiles = (p.width + COLUMNS - 1) / COLUMNS, which = simt::block_y() / tiles;
  const int column = (simt::block_y() - which * tiles) * COLUMNS + simt::thread_index() % 32 * COUNT;
  const int count = column < p.width ? COUNT : 0;
  const HeadsGradient from = which == 0 ? p.d_q : which == 1 ? p.d_k : p.d_v;
  const int head = column / p.head_width, value = column - head * p.head_width;
  const int64_t of_column = head * from.head + value * from.value, packed = which * int64_t{p.width} + column;
  const int first = simt::block_x() * p.rows_per_block;
  const int end = first + p.rows_per_block < p.rows ? first + p.rows_per_block : p.rows;
  Values sums = {};

  for (int row = first + simt::thread_index() / 32; row < end; row += HEADS_ROWS * PART_WARPS) {
    Words words[HEADS_ROWS];
    SIMT_UNROLL for (int i = 0; i < HEADS_ROWS; i++) {
      const int here = row + i * PART_WARPS, image = p.over_tokens.quotient(here);
      const int64_t place = image * from.batch + p.over_tokens.remainder(here, image) * from.token + of_column;
      load_words<WIDE>(from.elements, place, here < end ? count : 0, words[i]);
    }
    SIMT_UNROLL for (int i = 0; i < HEADS_ROWS; i++) {
      const int here = row + i * PART_WARPS;
      Values values;
      from_words(p.d_qkv.type, words[i], values);
      SIMT_UNROLL for (int j = 0; j < EIGHT; j++) sums[j] += values[j];
      store_words<WIDE>(p.d_qkv, here * p.packed_width + packed, here < end ? count : 0, words[i]);
    }
  }

  if (!p.partials) return;
  store_partial<WIDE>(32, PART_WARPS, count, sums, p.partials + simt::block_x() * p.packed_width + packed);
}

}  // namespace fastvit
