// bias_act: act(x + bias), perhaps times (up + up_bias); a read and a write of each.
//
// The warps of a block take its rows in turn, each lane eight columns. As for add_norm, types are known at run time.
#pragma once

#include <cmath>

#include "parts.h"

namespace fastvit {

constexpr int ACT_COLUMNS = 32 * EIGHT;  // of a block
constexpr int ACT_ROWS = 2;              // of a warp of the forward, whose loads are under way together

// Blocks that a multiprocessor has registers for.
constexpr int blocks_of_act_forward(bool is_gated) { return is_gated ? 3 : 4; }
constexpr int blocks_of_act_backward(bool is_gated) { return is_gated ? 2 : 3; }

// The function and its slope. Which one is no constant: all threads take one way through, and it is compiled once.
SIMT_DEVICE void activate(const BiasAct& p, const Values& at, Values& value, Values& slope) {
  if (p.function == 0) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      const float x = at[i], cdf = 0.5f + 0.5f * std::erf(x * 0.7071067811865476f);
      value[i] = x * cdf;
      slope[i] = cdf + x * (0.3989422804014327f * std::exp(-0.5f * x * x));
    }
  } else if (p.function == 1) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      value[i] = at[i] < 0 ? 0 : at[i];
      slope[i] = at[i] <= 0 ? 0 : 1;
    }
  } else {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      const float x = at[i], bounded = std::fmin(std::fabs(x), 1e19f);  // 0 · ∞ would be no number
      const float bend = p.cubic * bounded * bounded, inner = x * (p.linear + bend);
      // Neither sigmoid nor its slope is a difference of numbers that are nearly equal.
      const float small = std::exp(-std::fabs(inner)), large = 1 / (1 + small);
      const float gate = (inner < 0 ? small : 1) * large;
      value[i] = x * gate;
      slope[i] = gate + x * (small * large * large) * (p.linear + 3 * bend);
    }
  }
}

// Loaded words, plus the bias.
SIMT_DEVICE void add_bias(Type type, const Words& words, const Values& bias, Values& values) {
  from_words(type, words, values);
  SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] += bias[i];
}

SIMT_DEVICE int act_column() { return simt::block_y() * ACT_COLUMNS + simt::thread_index() % 32 * EIGHT; }

template <bool GATED, bool WIDE>
SIMT_KERNEL(PART_THREADS, blocks_of_act_forward(GATED))
bias_act_forward(BiasAct p) {
  const int column = act_column(), first = simt::block_x() * ACT_ROWS * PART_WARPS + simt::thread_index() / 32;
  Words x[ACT_ROWS], up[ACT_ROWS];
  SIMT_UNROLL for (int i = 0; i < ACT_ROWS; i++) {
    const Part part(first + i * PART_WARPS, p.rows, column, p.width, p.row_stride);
    load_part<WIDE>(p.x, part, x[i]);
    if constexpr (GATED) load_part<WIDE>(p.up, part, up[i]);
  }
  Values bias, up_bias;
  load_vector<WIDE>(p.bias, column, p.width, 0.0f, bias);
  if constexpr (GATED) load_vector<WIDE>(p.up_bias, column, p.width, 0.0f, up_bias);
  SIMT_UNROLL for (int i = 0; i < ACT_ROWS; i++) {
    Values at, value, slope, factor;
    add_bias(p.x.type, x[i], bias, at);
    activate(p, at, value, slope);
    if constexpr (GATED) {
      add_bias(p.up.type, up[i], up_bias, factor);
      SIMT_UNROLL for (int j = 0; j < EIGHT; j++) value[j] *= factor[j];
    }
    const Part part(first + i * PART_WARPS, p.rows, column, p.width);
    to_words(p.out.type, value, x[i]);
    store_words<WIDE>(p.out, part.place, part.count, x[i]);
  }
}

template <bool GATED, bool WIDE>
SIMT_KERNEL(PART_THREADS, blocks_of_act_backward(GATED))
bias_act_backward(BiasActBackward p) {
  const BiasAct& of = p.of;
  const int column = act_column(), warp = simt::thread_index() / 32, first = simt::block_x() * p.rows_per_block;
  const int end = first + p.rows_per_block < of.rows ? first + p.rows_per_block : of.rows;
  Values bias, up_bias, sums = {}, up_sums = {};
  load_vector<WIDE>(of.bias, column, of.width, 0.0f, bias);
  if constexpr (GATED) load_vector<WIDE>(of.up_bias, column, of.width, 0.0f, up_bias);

  for (int row = first + warp; row < end; row += PART_WARPS) {
    const Part part(row, end, column, of.width, of.row_stride), of_out(row, end, column, of.width);
    Words d_out, x, up;
    load_part<WIDE>(of.out, of_out, d_out);
    load_part<WIDE>(of.x, part, x);
    if constexpr (GATED) load_part<WIDE>(of.up, part, up);
    Values grad, at, value, slope;
    from_words(of.out.type, d_out, grad);
    add_bias(of.x.type, x, bias, at);
    activate(of, at, value, slope);
    if constexpr (GATED) {
      SIMT_UNROLL for (int i = 0; i < EIGHT; i++) value[i] *= grad[i], up_sums[i] += value[i];
      to_words(p.d_up.type, value, x);
      store_words<WIDE>(p.d_up, part.place, part.count, x);
      add_bias(of.up.type, up, up_bias, value);
      SIMT_UNROLL for (int i = 0; i < EIGHT; i++) grad[i] *= value[i];
    }
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) grad[i] *= slope[i], sums[i] += grad[i];
    to_words(p.d_x.type, grad, x);
    store_words<WIDE>(p.d_x, part.place, part.count, x);
  }

  if (!p.partials) return;
  const int64_t place = simt::block_x() * p.partials_stride + column;
  store_partial<WIDE>(32, PART_WARPS, of.width - column, sums, p.partials + place);
  if constexpr (GATED) store_partial<WIDE>(32, PART_WARPS, of.width - column, up_sums, p.of_up + place);
}

}  // namespace fastvit
