// Sums over rows, in float32: of all rows of a matrix, or of those with the same key. Neither atomics nor a sort: rows
// are added in the order they stand in, and splits of them in a further pass; the same input gives the same bits.
#pragma once

#include <algorithm>

#include "numeric.h"
#include "parameters.h"
#include "simt/launch.h"

namespace fastvit {

// sums [columns] = the sum of [rows, columns] elements of `type`, rows row_stride apart; zeros where there are no rows.
void sum_rows(Type type, const void* matrix, int64_t row_stride, int rows, int64_t columns, float* sums,
              const simt::Queue& queue);

// p.sums [segments, patches, D], of type `out`, which is float32 or `in`. rows_per_split is chosen here.
void sum_by_key(Type in, Type out, SumByKey p, const simt::Queue& queue);

// The same as sum_rows for what some hundred blocks have summed, in one launch whatever their number.
void sum_partials(const float* partials, int rows, int64_t columns, float* sums, const simt::Queue& queue);

// Splits of equal size but for the last; one that is empty where there are no rows.
struct Splits {
  int rows, count;

  // About as many as are wanted, of a multiple of some rows.
  Splits(int total, int wanted, int step = 1)
      : rows(step * std::max(1, simt::blocks_for(total, step * std::max(1, wanted)))),
        count(std::max(1, simt::blocks_for(total, rows))) {}
};

constexpr int SUM_THREADS = 256;
constexpr int AHEAD = 8;  // loads of a thread that are under way together

// Adds COUNT columns of some rows, in order. Behind the last row it loads that row again: a load that depends on a
// condition would be waited for at once.
template <int COUNT, class T>
SIMT_DEVICE void add_rows(const T* from, int64_t row_stride, int rows, float (&total)[COUNT]) {
  for (int row = 0; row < rows; row += AHEAD) {
    float values[AHEAD][COUNT];
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      load(from + (row + i < rows ? row + i : rows - 1) * row_stride, values[i]);
    }
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      SIMT_UNROLL for (int j = 0; j < COUNT; j++) total[j] += row + i < rows ? values[i][j] : 0.0f;
    }
  }
}

template <class T, int COUNT>
SIMT_KERNEL(SUM_THREADS, 2)
sum_rows(SumRows p) {
  const int64_t column = (static_cast<int64_t>(simt::block_x()) * SUM_THREADS + simt::thread_index()) * COUNT;
  if (column >= p.columns) return;
  const int first = simt::block_y() * p.rows_per_split;
  const int last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
  float total[COUNT] = {};
  add_rows(static_cast<const T*>(p.matrix) + first * p.row_stride + column, p.row_stride, last - first, total);
  store(p.sums + simt::block_y() * p.columns + column, total);
}

// All lanes' words, or'ed.
SIMT_DEVICE uint32_t or_of_warp(uint32_t word) {
  SIMT_UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) word |= simt::shuffle_xor(word, lanes);
  return word;
}

// A warp for each sum and 32 pieces of its columns. It looks at 32 keys at a time, each lane at one, and adds the rows
// that are found, each lane its piece.
template <class In, class Out, int COUNT>
SIMT_KERNEL(SUM_THREADS, 2)
sum_by_key(SumByKey p) {
  const int lane = simt::thread_index() % 32;
  const int warp = simt::block_x() * (SUM_THREADS / 32) + simt::thread_index() / 32;
  const int groups = (p.width / COUNT + 31) / 32, sum = warp / groups;
  const int segment = sum / p.patches, key = sum - segment * p.patches;
  if (segment >= p.segments) return;
  const int column = ((warp - sum * groups) * 32 + lane) * COUNT;
  const bool is_inside = column < p.width;

  const int start = segment * p.rows, split = simt::block_y() * p.rows_per_split;
  const int last = start + (split + p.rows_per_split < p.rows ? split + p.rows_per_split : p.rows);
  float total[COUNT] = {};
  for (int row = start + split; row < last; row += AHEAD * 32) {
    uint32_t found = 0;  // bit i: by this lane, among keys 32 i and on
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      const int m = row + i * 32 + lane;
      if (m < last && simt::load_element(p.keys + m) == key) found |= 1u << i;
    }
    const uint32_t found_by_any = or_of_warp(found);
    for (int i = 0; found_by_any >> i; i++) {
      if (!(found_by_any >> i & 1)) continue;
      uint32_t lanes = or_of_warp((found >> i & 1) << lane);
      for (int m = row + i * 32; lanes; m++, lanes >>= 1) {
        if (!(lanes & 1) || !is_inside) continue;
        const int64_t token = m + (m / p.kept + int64_t{1}) * p.prefix_rows;
        float value[COUNT];
        load(static_cast<const In*>(p.grad) + token * p.width + column, value);
        SIMT_UNROLL for (int j = 0; j < COUNT; j++) total[j] += value[j];
      }
    }
  }
  if (!is_inside) return;
  const int64_t place = static_cast<int64_t>(simt::block_y()) * p.segments * p.patches + sum;
  store(static_cast<Out*>(p.sums) + place * p.width + column, total);
}

}  // namespace fastvit
