// The ops add_position and add_position_backward.
#include "add_position.h"

#include "dispatch.h"
#include "ops.h"
#include "row_sums.h"

namespace fastvit {
namespace {

template <class In, class Out>
void launch_add_position(const AddPosition& p, const Queue& queue) {
  const bool is_wide = p.width % EIGHT == 0 && p.width_stride == 1 && p.batch_stride % EIGHT == 0 &&
                       p.token_stride % EIGHT == 0 && is_aligned(p.tokens) && is_aligned(p.positions) &&
                       is_aligned(p.prefix) && is_aligned(p.out);
  const int64_t pieces = static_cast<int64_t>(p.prefix_rows + p.patches) * (is_wide ? p.width / EIGHT : p.width);
  const auto kernel = is_wide ? add_position_forward<In, Out, EIGHT> : add_position_forward<In, Out, 1>;
  const int blocks = simt::blocks_for(pieces, ADD_THREADS) * simt::blocks_for(p.batch, ADD_IMAGES);
  simt::launch(queue, kernel, blocks, 1, ADD_THREADS, 0, p);
}

}  // namespace

void add_position(const View& tokens, const View& positions, const View& prefix, const View& out, const Queue& queue) {
  AddPosition p{};
  p.tokens = tokens.data, p.positions = positions.data, p.prefix = prefix.data, p.out = out.data;
  p.batch = tokens.size(0), p.patches = tokens.size(1), p.width = tokens.size(2);
  p.batch_stride = tokens.strides[0], p.token_stride = tokens.strides[1], p.width_stride = tokens.strides[2];
  p.prefix_rows = prefix ? prefix.size(0) : 0, p.position_rows = positions.size(0);
  p.positions_type = positions.type, p.prefix_type = prefix.type;
  with_type(tokens.type, [&](auto in) {
    with_type(out.type, [&](auto o) { launch_add_position<decltype(in), decltype(o)>(p, queue); });
  });
}

void add_position_backward(const View& grad, const View& d_rows, const Queue& queue) {
  const int64_t columns = grad.sizes[1] * grad.sizes[2];
  sum_rows(grad.type, grad.data, columns, grad.size(0), columns, static_cast<float*>(d_rows.data), queue);
}

}  // namespace fastvit
