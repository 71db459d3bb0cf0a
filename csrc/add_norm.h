// add_norm: residual + keep · scale · (branch + bias), and the norm of that sum; a read and a write of each.
//
// A thread holds eight values of a row, and as many warps share a row as its width takes. Types are known at run time
// alone: memory is what these kernels wait for, and one kernel serves all types. WIDE ones move 16 bytes at a time.
#pragma once

#include <cmath>

#include "parts.h"

namespace fastvit {

constexpr int LONGEST_ROW_THREADS = 1024;  // of a block of the forward, which has a row whole
constexpr int ROW_SLOT = LONGEST_ROW_THREADS / 32;  // words of shared memory for a sum over a row, one a warp

// Blocks of the backward that a multiprocessor has registers for.
constexpr int blocks_of_backward(bool is_scaled) { return is_scaled ? 2 : 3; }

// Sums over the threads that share a row. Slots are taken in turn: one is written again behind the other's barrier.
template <int N>
SIMT_DEVICE void sum_over_row(float (&sums)[N], int lanes, int slot) {
  SIMT_UNROLL for (float& sum : sums) sum = sum_of_warp(sum);
  if (lanes == 32) return;
  const auto place = [&](int warp) { return simt::shared_base() + 4 * N * (slot * ROW_SLOT + warp); };
  simt::Vector<N> words;
  SIMT_UNROLL for (int i = 0; i < N; i++) words.word[i] = simt::bits(sums[i]), sums[i] = 0;
  const int warp = simt::thread_index() / 32, first = simt::thread_index() / lanes * (lanes / 32);
  if (simt::thread_index() % 32 == 0) simt::store_shared<N>(place(warp), words);
  simt::sync_threads();
  for (int other = first; other < first + lanes / 32; other++) {
    words = simt::load_shared<N>(place(other));
    SIMT_UNROLL for (int i = 0; i < N; i++) sums[i] += simt::from_bits(words.word[i]);
  }
}

template <bool WIDE>
SIMT_KERNEL(LONGEST_ROW_THREADS, 1)
add_norm_forward(AddNorm p) {
  const int group = simt::thread_index() / p.lanes, lane = simt::thread_index() - group * p.lanes;
  const Part part(simt::block_x() * p.groups + group, p.rows, lane * EIGHT, p.width);
  const bool is_row = part.row < p.rows;
  Words words, branch;
  Values values, change, factor, offset;
  load_part<WIDE>(p.residual, part, words);
  load_part<WIDE>(p.branch, part, branch);
  const float keep = p.keep && is_row ? simt::load_element(p.keep + part.row / p.tokens) : 1.0f;

  from_words(p.residual.type, words, values);
  if (p.branch.data) {
    load_vector<WIDE>(p.bias, part.column, p.width, 0.0f, offset);
    load_vector<WIDE>(p.scale, part.column, p.width, 1.0f, factor);
    from_words(p.branch.type, branch, change);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] += (change[i] + offset[i]) * factor[i] * keep;
    to_words(p.sum.type, values, words);
    store_words<WIDE>(p.sum, part.place, part.count, words);
    // The norm sees what the next block will, and what backward can start from.
    from_words(p.sum.type, words, values);
  }

  float sum[1] = {}, squares[1] = {};
  SIMT_UNROLL for (int i = 0; i < EIGHT; i++) sum[0] += values[i];
  sum_over_row(sum, p.lanes, 0);
  const float mean = sum[0] / p.width * p.centre;
  SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
    values[i] -= mean;
    squares[0] += i < part.count ? values[i] * values[i] : 0.0f;
  }
  sum_over_row(squares, p.lanes, 1);
  const float deviation = 1 / std::sqrt(squares[0] / p.width + p.eps);
  if (is_row && lane == 0) {
    simt::store_element(p.statistics + part.row, mean);
    simt::store_element(p.statistics + p.rows + part.row, deviation);
  }

  load_vector<WIDE>(p.weight, part.column, p.width, 0.0f, factor);
  load_vector<WIDE>(p.norm_bias, part.column, p.width, 0.0f, offset);
  SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] = values[i] * deviation * factor[i] + offset[i];
  to_words(p.normed.type, values, words);
  store_words<WIDE>(p.normed, part.place, part.count, words);
}

// A row's mean and 1/deviation.
struct Statistics {
  float mean, deviation;
};

// Of a part the normed values, and the gradient of what the weight makes of them.
SIMT_DEVICE void normed_part(const AddNormBackward& p, const Words& sum, const Words& d_normed,
                             const Statistics& statistics, Values& normed, Values& grad) {
  from_words(p.sum.type, sum, normed);
  from_words(p.d_normed.type, d_normed, grad);
  SIMT_UNROLL for (float& value : normed) value = (value - statistics.mean) * statistics.deviation;
}

// Adds to the sums over a row, of grad · normed and of grad, what a part that is another block's has of them.
template <bool WIDE>
SIMT_DEVICE void add_other_part(const AddNormBackward& p, const Part& part, const Statistics& statistics,
                                float (&sums)[2]) {
  Words sum, d_normed;
  Values normed, grad, weight;
  load_part<WIDE>(p.sum, part, sum);
  load_part<WIDE>(p.d_normed, part, d_normed);
  load_vector<WIDE>(p.weight, part.column, p.width, 0.0f, weight);
  normed_part(p, sum, d_normed, statistics, normed, grad);
  SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
    sums[0] += grad[i] * weight[i] * normed[i];
    sums[1] += grad[i] * weight[i];
  }
}

// A block takes some rows: WHOLE ones, or as many of their columns as its threads hold, and reads the others for the
// sums over the row alone. SCALED: there may be a scale, or a factor a sample.
template <bool SCALED, bool WHOLE, bool WIDE>
SIMT_KERNEL(PART_THREADS, blocks_of_backward(SCALED))
add_norm_backward(AddNormBackward p) {
  const int group = simt::thread_index() / p.lanes, first_column = (simt::thread_index() - group * p.lanes) * EIGHT;
  const int columns = p.lanes * EIGHT, column = simt::block_y() * columns + first_column;
  const int first = simt::block_x() * p.rows_per_block;
  const int end = first + p.rows_per_block < p.rows ? first + p.rows_per_block : p.rows;
  Values weight, scale, d_weight = {}, d_norm_bias = {}, d_change = {}, d_scale = {};
  load_vector<WIDE>(p.weight, column, p.width, 0.0f, weight);
  if constexpr (SCALED) load_vector<WIDE>(p.scale, column, p.width, 1.0f, scale);

  for (int step = 0; step < p.rows_per_block; step += p.groups) {
    const Part part(first + step + group, end, column, p.width);
    Statistics statistics{};
    float keep = 1;
    if (part.row < end) {
      statistics = {simt::load_element(p.statistics + part.row), simt::load_element(p.statistics + p.rows + part.row)};
      if (SCALED && p.keep) keep = simt::load_element(p.keep + part.row / p.tokens);
    }
    float sums[2] = {};
    for (int other = first_column; !WHOLE && other < p.width; other += columns) {
      if (other != column) add_other_part<WIDE>(p, Part(part.row, end, other, p.width), statistics, sums);
    }

    Words sum, d_normed, d_sum, branch;
    load_part<WIDE>(p.sum, part, sum);
    load_part<WIDE>(p.d_normed, part, d_normed);
    load_part<WIDE>(p.d_sum, part, d_sum);
    if constexpr (SCALED) load_part<WIDE>(p.branch, part, branch);
    Values normed, grad;
    normed_part(p, sum, d_normed, statistics, normed, grad);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      d_weight[i] += grad[i] * normed[i];
      d_norm_bias[i] += grad[i];
      grad[i] *= weight[i];
      sums[0] += grad[i] * normed[i];
      sums[1] += grad[i];
    }
    sum_over_row(sums, p.lanes, step / p.groups % 2);
    const float along_normed = sums[0] / p.width, along_mean = sums[1] / p.width * p.centre;

    if (part.count <= 0) continue;
    Values result;
    from_words(p.d_sum.type, d_sum, result);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      result[i] += (grad[i] - normed[i] * along_normed - along_mean) * statistics.deviation;
    }
    to_words(p.d_residual.type, result, sum);
    store_words<WIDE>(p.d_residual, part.place, part.count, sum);
    if constexpr (SCALED) {
      Values change;
      from_words(p.branch.type, branch, change);
      SIMT_UNROLL for (int i = 0; i < EIGHT; i++) result[i] *= keep, d_scale[i] += result[i] * change[i];
    }
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      d_change[i] += result[i];
      if constexpr (SCALED) result[i] *= scale[i];
    }
    if (!p.d_branch.data) continue;
    to_words(p.d_branch.type, result, sum);
    store_words<WIDE>(p.d_branch, part.place, part.count, sum);
  }

  if constexpr (SCALED) {
    // scale · (branch + bias): what all rows have of both gradients is in these two sums.
    Values bias;
    load_vector<WIDE>(p.bias, column, p.width, 0.0f, bias);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      d_scale[i] += d_change[i] * bias[i];
      d_change[i] *= scale[i];
    }
  }
  float* to = p.partials + static_cast<int64_t>(simt::block_x()) * p.vectors * p.width;
  const auto store_next = [&](Values& sums) {
    store_partial<WIDE>(p.lanes, p.groups, p.width - column, sums, to + column);
    to += p.width;
  };
  store_next(d_weight);
  if (p.has_norm_bias) store_next(d_norm_bias);
  if (p.bias.data) store_next(d_change);
  if constexpr (SCALED) {
    if (p.scale.data) store_next(d_scale);
  }
}

}  // namespace fastvit
