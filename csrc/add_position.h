// add_position: [B, N, D] tokens plus positions, behind their prefix rows, in one pass. Each value is read and written
// once, eight to a thread where width and addresses allow it.
#pragma once

#include "numeric.h"
#include "parameters.h"
#include "simt/launch.h"

namespace fastvit {

constexpr int ADD_THREADS = 256;
constexpr int ADD_IMAGES = 8;  // a thread adds one piece of the table to as many images

template <class In, class Out, int COUNT>
SIMT_KERNEL(ADD_THREADS, 2)
add_position_forward(AddPosition p) {
  const int pieces = p.width / COUNT;
  const int rows = p.prefix_rows + p.patches;
  // Images are part of x, as y ends at 65,535 blocks.
  const int blocks = static_cast<int>((static_cast<int64_t>(rows) * pieces + ADD_THREADS - 1) / ADD_THREADS);
  const int group = simt::block_x() / blocks;
  const int64_t index = static_cast<int64_t>(simt::block_x() - group * blocks) * ADD_THREADS + simt::thread_index();
  if (index >= static_cast<int64_t>(rows) * pieces) return;
  const int row = static_cast<int>(index / pieces);
  const int column = static_cast<int>(index - static_cast<int64_t>(row) * pieces) * COUNT;
  const bool is_prefix = row < p.prefix_rows;

  float table[COUNT] = {};
  const int position = row - (rows - p.position_rows);
  if (position >= 0) load(p.positions_type, p.positions, static_cast<int64_t>(position) * p.width + column, table);
  if (is_prefix) {
    float value[COUNT];
    load(p.prefix_type, p.prefix, static_cast<int64_t>(row) * p.width + column, value);
    SIMT_UNROLL for (int i = 0; i < COUNT; i++) table[i] += value[i];
  }

  const int first = group * ADD_IMAGES;
  const int last = first + ADD_IMAGES < p.batch ? first + ADD_IMAGES : p.batch;
  const int64_t place = (row - p.prefix_rows) * p.token_stride + column * p.width_stride;
  for (int image = first; image < last; image++) {
    float value[COUNT] = {};
    if (!is_prefix) load(static_cast<const In*>(p.tokens) + image * p.batch_stride + place, value);
    SIMT_UNROLL for (int i = 0; i < COUNT; i++) value[i] += table[i];
    Out* out = static_cast<Out*>(p.out) + (static_cast<int64_t>(image) * rows + row) * p.width + column;
    store(out, value);
  }
}

}  // namespace fastvit
