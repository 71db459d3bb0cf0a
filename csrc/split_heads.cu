// The op split_heads_backward.
#include "split_heads.h"

#include "ops.h"

namespace fastvit {
namespace {

HeadsGradient gradient_of(const View& view) {
  return {elements_of(view), view.strides[0], view.strides[1], view.strides[2], view.strides[3]};
}

// Whether eight values of a head can be moved at once.
bool is_wide(const HeadsGradient& from) {
  const bool fits = from.batch % EIGHT == 0 && from.head % EIGHT == 0 && from.token % EIGHT == 0 && from.value == 1;
  return fits && is_aligned(from.elements.data);
}

}  // namespace

void split_heads_backward(const View& d_q, const View& d_k, const View& d_v, const View& d_qkv, const View& sums,
                          const Queue& queue) {
  SplitHeads p{};
  p.d_q = gradient_of(d_q), p.d_k = gradient_of(d_k), p.d_v = gradient_of(d_v), p.d_qkv = elements_of(d_qkv);
  p.rows = d_q.size(0) * d_q.size(2), p.head_width = d_q.size(3), p.width = d_q.size(1) * p.head_width;
  p.packed_width = 3 * int64_t{p.width}, p.over_tokens = Divider(d_q.size(2));
  const bool wide = is_wide(p.head_width, {p.d_qkv}) && is_wide(p.d_q) && is_wide(p.d_k) && is_wide(p.d_v);
  const int tiles = 3 * simt::blocks_for(p.width, heads_columns(wide));
  const Splits splits(p.rows, MULTIPROCESSORS * HEADS_BLOCKS / tiles, HEADS_ROWS * PART_WARPS);
  p.rows_per_block = splits.rows;
  if (sums) p.partials = queue.scratch<float>("partial sums", splits.count * p.packed_width);
  const auto kernel = wide ? split_heads_backward<true> : split_heads_backward<false>;
  simt::launch(queue, kernel, splits.count, tiles, PART_THREADS, PARTIAL_BYTES, p);
  if (sums) sum_partials(p.partials, splits.count, p.packed_width, static_cast<float*>(sums.data), queue);
}

}  // namespace fastvit
