// How sums over rows are divided into launches.
#include "row_sums.h"

#include <algorithm>

#include "dispatch.h"

namespace fastvit {
namespace {

// Constants, so that the same sum has the same bits on every GPU and at every address.
constexpr int BLOCKS = 264;         // that a sum is to be divided into: two for each multiprocessor of an H100
constexpr int LEAST_ROWS = 32;      // of a split: for fewer, a further pass costs more than it saves
constexpr int MOST_ROWS = 256;      // more, one after another in float32, would lose digits
constexpr int KEYS_A_SPLIT = 1024;  // more where there would be too many splits
constexpr int MOST_SPLITS = 16;     // by keys: every one of them writes a sum for each key
constexpr int GRID_Y = 65535;       // what CUDA allows

Splits splits_of_rows(int rows, int64_t columns) {
  const int column_blocks = simt::blocks_for(columns, SUM_THREADS * EIGHT);
  const int wanted = std::max(BLOCKS / column_blocks, simt::blocks_for(rows, MOST_ROWS));
  return {rows, std::min({wanted, simt::blocks_for(rows, LEAST_ROWS), GRID_Y})};
}

template <class T>
void launch_sum_rows(const SumRows& p, int splits, const simt::Queue& queue) {
  const bool is_wide =
      p.columns % EIGHT == 0 && p.row_stride % EIGHT == 0 && is_aligned(p.matrix) && is_aligned(p.sums);
  const int64_t pieces = is_wide ? p.columns / EIGHT : p.columns;
  const auto kernel = is_wide ? sum_rows<T, EIGHT> : sum_rows<T, 1>;
  simt::launch(queue, kernel, simt::blocks_for(pieces, SUM_THREADS), splits, SUM_THREADS, 0, p);
}

template <class In, class Out>
void launch_sum_by_key(const SumByKey& p, int splits, const simt::Queue& queue) {
  const bool is_wide = p.width % EIGHT == 0 && is_aligned(p.grad) && is_aligned(p.sums);
  const int groups = simt::blocks_for(is_wide ? p.width / EIGHT : p.width, 32);
  const int64_t warps = static_cast<int64_t>(p.segments) * p.patches * groups;
  const auto kernel = is_wide ? sum_by_key<In, Out, EIGHT> : sum_by_key<In, Out, 1>;
  simt::launch(queue, kernel, simt::blocks_for(warps, SUM_THREADS / 32), splits, SUM_THREADS, 0, p);
}

// What the blocks of a launch have summed: a lane adds up a column, its warp every eighth row, and the warps' sums are
// added in order.
SIMT_KERNEL(SUM_THREADS, 2)
sum_partials(SumRows p) {
  constexpr int WARPS = SUM_THREADS / 32;
  const int warp = simt::thread_index() / 32, lane = simt::thread_index() % 32;
  const int64_t column = simt::block_x() * int64_t{32} + lane;
  float total[1] = {};
  if (column < p.columns) {
    const float* first = static_cast<const float*>(p.matrix) + warp * p.row_stride + column;
    add_rows(first, WARPS * p.row_stride, (p.rows - warp + WARPS - 1) / WARPS, total);
  }
  const auto place = [&](int warp) { return simt::shared_base() + 4 * (warp * 32 + lane); };
  simt::store_shared<1>(place(warp), {{simt::bits(total[0])}});
  simt::sync_threads();
  if (warp > 0 || column >= p.columns) return;
  SIMT_UNROLL for (int other = 1; other < WARPS; other++) {
    total[0] += simt::from_bits(simt::load_shared<1>(place(other)).word[0]);
  }
  simt::store_element(p.sums + column, total[0]);
}

}  // namespace

void sum_partials(const float* partials, int rows, int64_t columns, float* sums, const simt::Queue& queue) {
  const SumRows p{partials, sums, columns, columns, rows, rows};
  simt::launch(queue, sum_partials, simt::blocks_for(columns, 32), 1, SUM_THREADS, 4 * SUM_THREADS, p);
}

void sum_rows(Type type, const void* matrix, int64_t row_stride, int rows, int64_t columns, float* sums,
              const simt::Queue& queue) {
  if (columns == 0) return;
  const Splits splits = splits_of_rows(rows, columns);
  const bool is_last = splits.count == 1;
  float* target = is_last ? sums : queue.scratch<float>("sums of rows", splits.count * columns);
  const SumRows p{matrix, target, columns, row_stride, rows, splits.rows};
  with_type(type, [&](auto t) { launch_sum_rows<decltype(t)>(p, splits.count, queue); });
  if (!is_last) sum_rows(Type::FLOAT32, target, columns, splits.count, columns, sums, queue);
}

void sum_by_key(Type in, Type out, SumByKey p, const simt::Queue& queue) {
  const bool is_float = out == Type::FLOAT32;
  if (!is_float && in != out) throw std::invalid_argument("out: float32 or the type of the gradient");
  // Sums that have been rounded can't be added up.
  const Splits splits(p.rows, is_float ? std::min(simt::blocks_for(p.rows, KEYS_A_SPLIT), MOST_SPLITS) : 1);
  const int64_t columns = static_cast<int64_t>(p.segments) * p.patches * p.width;
  void* const sums = p.sums;
  if (splits.count > 1) p.sums = queue.scratch<float>("sums by key", splits.count * columns);
  p.rows_per_split = splits.rows;
  with_type(in, [&](auto i) {
    using In = decltype(i);
    if (is_float) return launch_sum_by_key<In, float>(p, splits.count, queue);
    launch_sum_by_key<In, In>(p, splits.count, queue);
  });
  if (splits.count > 1) {
    sum_rows(Type::FLOAT32, p.sums, columns, splits.count, columns, static_cast<float*>(sums), queue);
  }
}

}  // namespace fastvit
