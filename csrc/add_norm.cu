// The ops add_norm and add_norm_backward.
#include "add_norm.h"

#include <algorithm>

#include "ops.h"

namespace fastvit {
namespace {

// Threads that hold `width` values, in whole warps.
int lanes_for(int width) { return 32 * simt::blocks_for(width, 32 * EIGHT); }

// What both directions are told alike.
template <class Parameters>
Parameters parameters_of(const AddNormInputs& inputs) {
  Parameters p{};
  p.branch = elements_of(inputs.branch), p.bias = elements_of(inputs.bias), p.scale = elements_of(inputs.scale);
  p.weight = elements_of(inputs.weight), p.keep = static_cast<const float*>(inputs.keep.data);
  p.rows = inputs.residual.size(0), p.width = inputs.residual.size(1);
  p.tokens = p.keep ? p.rows / inputs.keep.size(0) : 1;
  p.centre = inputs.rms ? 0.0f : 1.0f;
  return p;
}

// Leaves its sums in `blocks` rows of partials.
void launch_backward(AddNormBackward p, int blocks, bool is_scaled, const Queue& queue) {
  const bool is_whole = p.width <= p.lanes * EIGHT;
  auto kernel = add_norm_backward<true, false, false>;
  if (is_wide(p.width, {p.sum, p.d_normed, p.d_sum, p.branch, p.bias, p.scale, p.weight, p.d_residual, p.d_branch})) {
    kernel = !is_whole ? add_norm_backward<true, false, true>
                       : is_scaled ? add_norm_backward<true, true, true> : add_norm_backward<false, true, true>;
  }
  const int parts = simt::blocks_for(p.width, p.lanes * EIGHT);
  simt::launch(queue, kernel, blocks, parts, p.lanes * p.groups, PARTIAL_BYTES, p);
}

}  // namespace

void add_norm(const AddNormInputs& inputs, float eps, const View& sum, const View& normed, const View& statistics,
              const Queue& queue) {
  if (inputs.residual.sizes[0] == 0) return;
  auto p = parameters_of<AddNorm>(inputs);
  p.residual = elements_of(inputs.residual), p.norm_bias = elements_of(inputs.norm_bias);
  p.sum = elements_of(sum), p.normed = elements_of(normed), p.statistics = static_cast<float*>(statistics.data);
  p.eps = eps;
  p.lanes = lanes_for(p.width), p.groups = std::max(1, PART_THREADS / p.lanes);
  const bool wide = is_wide(p.width, {p.residual, p.branch, p.bias, p.scale, p.weight, p.norm_bias, p.sum, p.normed});
  const auto kernel = wide ? add_norm_forward<true> : add_norm_forward<false>;
  simt::launch(queue, kernel, simt::blocks_for(p.rows, p.groups), 1, p.lanes * p.groups, 4 * 2 * ROW_SLOT, p);
}

void add_norm_backward(const AddNormInputs& inputs, const AddNormGradients& gradients, const Queue& queue) {
  const int rows = inputs.residual.size(0), vectors = gradients.d_vectors.size(0);
  const int64_t columns = gradients.d_vectors.sizes[0] * gradients.d_vectors.sizes[1];
  int blocks = 0;
  float* partials = nullptr;
  if (rows > 0) {
    auto p = parameters_of<AddNormBackward>(inputs);
    p.sum = elements_of(inputs.residual), p.branch = inputs.scale ? p.branch : Elements{};
    p.d_normed = elements_of(gradients.d_normed), p.d_sum = elements_of(gradients.d_sum);
    p.statistics = static_cast<const float*>(gradients.statistics.data);
    p.d_residual = elements_of(gradients.d_residual), p.d_branch = elements_of(gradients.d_branch);
    p.has_norm_bias = bool(inputs.norm_bias), p.vectors = vectors;
    p.lanes = std::min(lanes_for(p.width), PART_THREADS), p.groups = PART_THREADS / p.lanes;
    const bool is_scaled = inputs.scale || inputs.keep;
    const Splits splits(rows, MULTIPROCESSORS * blocks_of_backward(is_scaled), p.groups);
    p.rows_per_block = splits.rows, blocks = splits.count;
    p.partials = partials = queue.scratch<float>("partial sums", blocks * columns);
    launch_backward(p, blocks, is_scaled, queue);
  }
  sum_partials(partials, blocks, columns, static_cast<float*>(gradients.d_vectors.data), queue);
}

}  // namespace fastvit
