// Rows of images of any sizes: where each lies and what it becomes, and sums over the rows of one position.
#pragma once

#include "patches.h"
#include "row_sums.h"

namespace fastvit {

enum PackedField { FIRST, ORIGIN, PLANE_STRIDE, ROW_STRIDE, GRID_WIDTH, START, BY_START, SORTED_STARTS };

SIMT_DEVICE int64_t field_of(const PackedRows& p, PackedField field, int image) {
  return simt::load_element(p.table + static_cast<int64_t>(field) * p.count + image);
}

// How many of the images' sorted numbers are at most `limit`.
SIMT_DEVICE int count_at_most(const PackedRows& p, PackedField field, int64_t limit) {
  int low = 0, high = p.count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (field_of(p, field, middle) <= limit) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Fills places and tokens, a row a thread.
SIMT_KERNEL(SUM_THREADS, 2)
place_rows(PackedRows p) {
  const int m = simt::block_x() * SUM_THREADS + simt::thread_index();
  if (m >= p.rows) return;
  const int image = count_at_most(p, FIRST, m) - 1;
  const int index = m - static_cast<int>(field_of(p, FIRST, image));
  const int grid_width = static_cast<int>(field_of(p, GRID_WIDTH, image));
  const int64_t row_stride = field_of(p, ROW_STRIDE, image);
  const int y = index / grid_width, x = index - y * grid_width;
  const auto origin = static_cast<uint64_t>(field_of(p, ORIGIN, image) + y * (p.patch_height * row_stride) +
                                            static_cast<int64_t>(x) * p.stretch);
  simt::store_global<4>(p.places + m, simt::Vector<4>{{static_cast<uint32_t>(origin), static_cast<uint32_t>(origin >> 32),
                                                       static_cast<uint32_t>(field_of(p, PLANE_STRIDE, image)),
                                                       static_cast<uint32_t>(row_stride)}});
  const auto position = static_cast<uint32_t>(field_of(p, START, image) + index);
  simt::store_global<2>(p.tokens + m,
                        simt::Vector<2>{{position, static_cast<uint32_t>(m + (image + 1) * p.prefix_rows)}});
}

// COUNT columns of a row of the prefix, over all images, or of a position, over those that have it, in the order of
// their first positions.
template <class T, int COUNT>
SIMT_KERNEL(SUM_THREADS, 2)
sum_positions(SumPositions p) {
  const PackedRows& images = p.images;
  const int pieces = p.width / COUNT;
  const int64_t index = static_cast<int64_t>(simt::block_x()) * SUM_THREADS + simt::thread_index();
  const int row = static_cast<int>(index / pieces), position = row - images.prefix_rows;
  if (row >= images.prefix_rows + images.positions) return;
  const int column = static_cast<int>(index - static_cast<int64_t>(row) * pieces) * COUNT;
  const bool is_prefix = position < 0;
  const int low = is_prefix ? 0 : count_at_most(images, SORTED_STARTS, position - images.longest);
  const int high = is_prefix ? images.count : count_at_most(images, SORTED_STARTS, position);

  float total[COUNT] = {};
  for (int which = low; which < high; which += AHEAD) {
    float values[AHEAD][COUNT];
    uint32_t is_there = 0;  // a bit an image
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      const bool is_one = which + i < high;
      const int image = static_cast<int>(field_of(images, BY_START, is_one ? which + i : low));
      const int first = static_cast<int>(field_of(images, FIRST, image));
      const int last = image + 1 < images.count ? static_cast<int>(field_of(images, FIRST, image + 1)) : images.rows;
      const int n = is_prefix ? position : position - static_cast<int>(field_of(images, START, image));
      const bool has_it = is_one && n < last - first;
      is_there |= static_cast<uint32_t>(has_it) << i;
      // A load that depends on a condition would be waited for at once: that of the first row stands for none.
      const int64_t token = has_it ? first + (image + 1) * images.prefix_rows + n : 0;
      load(static_cast<const T*>(p.grad) + token * p.width + column, values[i]);
    }
    SIMT_UNROLL for (int i = 0; i < AHEAD; i++) {
      SIMT_UNROLL for (int j = 0; j < COUNT; j++) total[j] += is_there >> i & 1 ? values[i][j] : 0.0f;
    }
  }
  store(p.sums + static_cast<int64_t>(row) * p.width + column, total);
}

}  // namespace fastvit
