// Small passes between a checkpoint's weight and the products: W' and the table of row constants, the weight transposed
// for the image gradient, and the weight's gradient from its splits. Each output is written once, by one thread.
#pragma once

#include "pipeline.h"
#include "row_sums.h"

namespace fastvit {

// `compute` is the type of W' and of the transposed weight.
void prepare_weight(Type compute, const PrepareWeight& p, const simt::Queue& queue);
void prepare_normaliser(const PrepareWeight& p, const simt::Queue& queue);  // p.normaliser alone
void transpose_weight(Type compute, const TransposeWeight& p, const simt::Queue& queue);
void finish_weight_gradient(const FinishWeightGradient& p, const simt::Queue& queue);

constexpr int WEIGHT_THREADS = 256;
constexpr int WEIGHT_ROWS = WEIGHT_THREADS / 32;  // rows of the weight that a block prepares, a warp each
constexpr int TRANSPOSED = 32;                    // rows and columns of a block of the transposed weight

enum Constant { WEIGHT_SCALE, PIXEL_SHIFT, BIAS_SHIFT, PIXEL_SCALE };  // rows of the constants

// A value of a patch: whose channel it is, and where it lies in [C, P_h, P_w].
struct Place {
  int channel, source;
};

template <class Parameters>
SIMT_DEVICE Place place_of(const Parameters& p, int k) {
  const int area = p.patch_height * p.patch_width;
  const int quotient = static_cast<uint32_t>(k) / static_cast<uint32_t>(p.channels_last ? p.channels : area);
  if (!p.channels_last) return {quotient, k};
  const int channel = k - quotient * p.channels;
  return {channel, channel * area + quotient};
}

template <class Parameters>
SIMT_DEVICE float constant_of(const Parameters& p, Constant which, int channel) {
  return simt::load_element(p.constants + which * p.channels + channel);
}

// Where value k of row d of W' lies.
SIMT_DEVICE int64_t prepared_place(const PrepareWeight& p, int d, int k) {
  if (!p.in_tiles) return static_cast<int64_t>(d) * p.weight_length + k;
  constexpr int ROWS = WEIGHT_TILE_ROWS, VALUES = WEIGHT_TILE_VALUES, SIZE = 2;
  const int64_t first_tile = static_cast<int64_t>(d - d % ROWS) * p.weight_length;
  return first_tile + k / VALUES * ROWS * VALUES + swizzled<VALUES * SIZE>(d % ROWS, k % VALUES * SIZE) / SIZE;
}

// A warp writes row d of W'. Returns the lane's part of sum_k W' bias_shift, of the rounded W': rounding it then costs
// nothing on an image of the mean's colour.
template <class Compute, class Weight>
SIMT_DEVICE float prepare_row(const PrepareWeight& p, const Weight* weight, int d) {
  const bool is_inside = d < p.width;
  const Weight* row = weight + static_cast<int64_t>(is_inside ? d : 0) * p.k_length;
  float correction = 0;
  for (int first = simt::thread_index() % 32; first < p.weight_length; first += AHEAD * 32) {
    float scaled[AHEAD], shift[AHEAD];
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      const int k = first + i * 32;
      const Place place = place_of(p, k < p.k_length ? k : p.k_length - 1);  // no condition on the loads: see add_rows
      scaled[i] = simt::to_float(simt::load_element(row + place.source)) * constant_of(p, WEIGHT_SCALE, place.channel);
      shift[i] = constant_of(p, BIAS_SHIFT, place.channel);
    }
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      const int k = first + i * 32;
      const Compute rounded = simt::round_to<Compute>(is_inside && k < p.k_length ? scaled[i] : 0.0f);
      if (shift[i] != 0) correction += simt::to_float(rounded) * shift[i];  // infinite weights times 0 are no number
      if (k >= p.weight_length) continue;
      simt::store_element(static_cast<Compute*>(p.prepared) + prepared_place(p, d, k), rounded);
    }
  }
  return correction;
}

// Column d of the table, by the threads that share it: rows `start`, start + step and so on, of the prefix and of the
// patches each.
template <class Position>
SIMT_DEVICE void fill_table(const PrepareWeight& p, const Position* positions, float bias, int d, int start, int step) {
  const int rows = p.prefix_rows + p.patches, position_start = rows - p.position_rows;
  const auto position_of = [&](int row) {
    if (row < position_start) return 0.0f;
    return simt::to_float(simt::load_element(positions + static_cast<int64_t>(row - position_start) * p.width + d));
  };
  for (int row = start; row < p.prefix_rows; row += step) {
    const int64_t place = static_cast<int64_t>(row) * p.width + d;
    simt::store_element(p.table + place, load_one(p.prefix_type, p.prefix, place) + position_of(row));
  }
  for (int first = p.prefix_rows + start; first < rows; first += AHEAD * step) {
    float position[AHEAD];
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      const int row = first + i * step;
      position[i] = position_of(row < rows ? row : rows - 1);
    }
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      const int row = first + i * step;
      if (row < rows) simt::store_element(p.table + static_cast<int64_t>(row) * p.width + d, bias + position[i]);
    }
  }
}

// What is subtracted from the pixel at k and what it is multiplied by, for every `step`th k from `first` on.
SIMT_DEVICE void fill_normaliser(const PrepareWeight& p, int first, int step) {
  for (int k = first; k < p.k_padded; k += step) {
    const bool is_inside = k < p.k_length;
    const int channel = is_inside ? place_of(p, k).channel : 0;
    simt::store_element(p.normaliser + k, is_inside ? constant_of(p, PIXEL_SHIFT, channel) : 0.0f);
    simt::store_element(p.normaliser + p.k_padded + k, is_inside ? constant_of(p, PIXEL_SCALE, channel) : 0.0f);
  }
}

template <class Compute>
SIMT_KERNEL(WEIGHT_THREADS, 2)
prepare_weight(PrepareWeight p) {
  const int thread = simt::thread_index(), warp = thread / 32, first = simt::block_x() * WEIGHT_ROWS;
  const int row = first + warp;
  float bias = 0;
  if (row < p.weight_rows) {
    bias = with_elements(p.weight_type, p.weight, [&](auto weight) { return prepare_row<Compute>(p, weight, row); });
    bias = sum_of_warp(bias) * p.inverse_factor;
    if (p.bias && row < p.width) bias += load_one(p.bias_type, p.bias, row);
  }
  const simt::shared_address biases = simt::shared_base();
  if (thread % 32 == 0) simt::store_shared<1>(biases + 4 * warp, {{simt::bits(bias)}});
  simt::sync_threads();

  // Threads side by side take the block's rows of the weight, which are columns of the table.
  const int which = thread % WEIGHT_ROWS, d = first + which;
  bias = simt::from_bits(simt::load_shared<1>(biases + 4 * which).word[0]);
  if (d < p.width) {
    with_elements(p.positions_type, p.positions, [&](auto positions) {
      fill_table(p, positions, bias, d, thread / WEIGHT_ROWS, WEIGHT_THREADS / WEIGHT_ROWS);
    });
  }

  if (p.normaliser) fill_normaliser(p, simt::block_x() * WEIGHT_THREADS + thread, simt::grid_x() * WEIGHT_THREADS);
}

// A square of the weight by way of shared memory, so that both sides are read and written along their rows.
template <class Compute>
SIMT_KERNEL(WEIGHT_THREADS, 2)
transpose_weight(TransposeWeight p) {
  constexpr int STEP = WEIGHT_THREADS / TRANSPOSED;
  const int across = simt::thread_index() % TRANSPOSED, down = simt::thread_index() / TRANSPOSED;
  const int first_k = simt::block_x() * TRANSPOSED, first_d = simt::block_y() * TRANSPOSED;
  // Rows of an odd number of words, so that those of a column lie in different banks.
  const auto word = [](int d, int k) { return simt::shared_base() + 4 * (d * (TRANSPOSED + 1) + k); };

  const Place place = place_of(p, first_k + across);
  const bool has_k = first_k + across < p.k_length;
  with_elements(p.weight_type, p.weight, [&](auto weight) {
    SIMT_UNROLL for (int row = 0; row < TRANSPOSED; row += STEP) {
      const int d = first_d + row + down;
      float value = 0;
      if (has_k && d < p.width) {
        value = simt::to_float(simt::load_element(weight + static_cast<int64_t>(d) * p.k_length + place.source));
      }
      simt::store_shared<1>(word(row + down, across), {{simt::bits(value)}});
    }
  });
  if (has_k && simt::block_y() == 0 && down == 0) {
    simt::store_element(p.scale + first_k + across, constant_of(p, PIXEL_SCALE, place.channel));
  }
  simt::sync_threads();

  SIMT_UNROLL for (int row = 0; row < TRANSPOSED; row += STEP) {
    const int k = first_k + row + down, d = first_d + across;
    if (k >= p.k_length || d >= p.width_padded) continue;
    const float value = simt::from_bits(simt::load_shared<1>(word(across, row + down)).word[0]);
    Compute* transposed = static_cast<Compute*>(p.transposed) + static_cast<int64_t>(k) * p.width_padded;
    simt::store_element(transposed + d, simt::round_to<Compute>(value));
  }
}

template <class Weight>
SIMT_KERNEL(WEIGHT_THREADS, 2)
finish_weight_gradient(FinishWeightGradient p) {
  const int index = simt::block_x() * WEIGHT_THREADS + simt::thread_index();
  const int d = index / p.k_length, k = index - d * p.k_length;
  if (d >= p.width) return;
  const Place place = place_of(p, k);
  float total[1] = {};
  const int64_t row = static_cast<int64_t>(d) * p.k_padded;
  add_rows(p.parts + row + k, static_cast<int64_t>(p.width) * p.k_padded, p.splits, total);
  if (p.d_bias) total[0] += simt::load_element(p.d_bias + d) * constant_of(p, BIAS_SHIFT, place.channel);
  const float value = total[0] * constant_of(p, WEIGHT_SCALE, place.channel) * p.inverse_factor;
  Weight* gradient = static_cast<Weight*>(p.d_weight) + static_cast<int64_t>(d) * p.k_length;
  simt::store_element(gradient + place.source, simt::round_to<Weight>(value));
}

}  // namespace fastvit
