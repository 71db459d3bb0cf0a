// add_position: [B, N, D] tokens plus positions, behind their prefix rows, in one pass; and the sum over the batch that
// its backward needs. Both read and write each value once, eight to a thread where width and addresses allow it.
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
  const int64_t index = static_cast<int64_t>(simt::block_x()) * ADD_THREADS + simt::thread_index();
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

  const int first = simt::block_y() * ADD_IMAGES;
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

constexpr int SUM_THREADS = 256;

template <class T, int COUNT>
SIMT_KERNEL(SUM_THREADS, 2)
sum_rows(SumRows p) {
  const int64_t column = (static_cast<int64_t>(simt::block_x()) * SUM_THREADS + simt::thread_index()) * COUNT;
  if (column >= p.columns) return;
  const int first = simt::block_y() * p.rows_per_split;
  const int last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
  float total[COUNT] = {};
  for (int row = first; row < last; row++) {
    float value[COUNT];
    load(static_cast<const T*>(p.matrix) + row * p.columns + column, value);
    SIMT_UNROLL for (int i = 0; i < COUNT; i++) total[i] += value[i];
  }
  store(p.sums + simt::block_y() * p.columns + column, total);
}

// Launchers: they choose an instantiation and the grid.

template <class In, class Out>
void launch_add_position(const AddPosition& p, simt::Stream& stream) {
  const bool is_wide = p.width % EIGHT == 0 && p.width_stride == 1 && p.batch_stride % EIGHT == 0 &&
                       p.token_stride % EIGHT == 0 && is_aligned(p.tokens) && is_aligned(p.positions) &&
                       is_aligned(p.prefix) && is_aligned(p.out);
  const int64_t pieces = static_cast<int64_t>(p.prefix_rows + p.patches) * (is_wide ? p.width / EIGHT : p.width);
  const auto kernel = is_wide ? add_position_forward<In, Out, EIGHT> : add_position_forward<In, Out, 1>;
  stream.launch(kernel, simt::blocks_for(pieces, ADD_THREADS), simt::blocks_for(p.batch, ADD_IMAGES), ADD_THREADS, 0, p);
}

template <class T>
void launch_sum_rows(const SumRows& p, simt::Stream& stream) {
  const bool is_wide = p.columns % EIGHT == 0 && is_aligned(p.matrix) && is_aligned(p.sums);
  const int64_t pieces = is_wide ? p.columns / EIGHT : p.columns;
  const auto kernel = is_wide ? sum_rows<T, EIGHT> : sum_rows<T, 1>;
  stream.launch(kernel, simt::blocks_for(pieces, SUM_THREADS), simt::blocks_for(p.rows, p.rows_per_split), SUM_THREADS, 0, p);
}

}  // namespace fastvit
