// The ops bias_act and bias_act_backward.
#include "bias_act.h"

#include <tuple>
#include <utility>

#include "ops.h"

namespace fastvit {
namespace {

// What goes through the function and what that is multiplied by: x and up, or in both orders the halves of a packed x;
// and so of what belongs to them.
template <class T>
std::pair<T, T> operands(const BiasActInputs& inputs, T x, T up, T second_half) {
  if (!inputs.gate_last) return {x, up};
  return *inputs.gate_last ? std::pair(second_half, x) : std::pair(x, second_half);
}

std::pair<Elements, Elements> operands(const BiasActInputs& inputs, int width, const View& x, const View& up) {
  char* const data = static_cast<char*>(x.data);
  const Elements second_half{data ? data + width * bytes_of(x.type) : nullptr, x.type};
  return operands(inputs, elements_of(x), elements_of(up), second_half);
}

// `out`: the result, or its gradient.
BiasAct parameters_of(const BiasActInputs& inputs, const View& out) {
  BiasAct p{};
  p.out = elements_of(out), p.row_stride = inputs.x.sizes[1], p.rows = out.size(0), p.width = out.size(1);
  std::tie(p.x, p.up) = operands(inputs, p.width, inputs.x, inputs.up);
  std::tie(p.bias, p.up_bias) = operands(inputs, p.width, inputs.bias, inputs.up_bias);
  p.function = inputs.function, p.linear = inputs.linear, p.cubic = inputs.cubic;
  return p;
}

}  // namespace

void bias_act(const BiasActInputs& inputs, const View& out, const Queue& queue) {
  const BiasAct p = parameters_of(inputs, out);
  const bool wide = is_wide(p.width, {p.x, p.up, p.bias, p.up_bias, p.out});
  auto kernel = wide ? bias_act_forward<false, true> : bias_act_forward<false, false>;
  if (inputs.up || inputs.gate_last) kernel = wide ? bias_act_forward<true, true> : bias_act_forward<true, false>;
  const int blocks = simt::blocks_for(p.rows, ACT_ROWS * PART_WARPS);
  simt::launch(queue, kernel, blocks, simt::blocks_for(p.width, ACT_COLUMNS), PART_THREADS, 0, p);
}

void bias_act_backward(const BiasActInputs& inputs, const BiasActGradients& gradients, const Queue& queue) {
  BiasActBackward p{};
  const BiasAct& of = p.of = parameters_of(inputs, gradients.d_out);
  std::tie(p.d_x, p.d_up) = operands(inputs, of.width, gradients.d_x, gradients.d_up);
  const bool is_gated = inputs.up || inputs.gate_last;
  const int tiles = simt::blocks_for(of.width, ACT_COLUMNS);
  const Splits splits(of.rows, MULTIPROCESSORS * blocks_of_act_backward(is_gated) / tiles, PART_WARPS);
  p.rows_per_block = splits.rows;
  float* partials = nullptr;
  if (gradients.sums) {
    p.partials_stride = gradients.sums.sizes[0];
    partials = queue.scratch<float>("partial sums", splits.count * p.partials_stride);
    std::tie(p.partials, p.of_up) = operands(inputs, partials, partials + of.width, partials + of.width);
  }
  const bool wide = is_wide(of.width, {of.x, of.up, of.bias, of.up_bias, of.out, p.d_x, p.d_up});
  auto kernel = wide ? bias_act_backward<false, true> : bias_act_backward<false, false>;
  if (is_gated) kernel = wide ? bias_act_backward<true, true> : bias_act_backward<true, false>;
  simt::launch(queue, kernel, splits.count, tiles, PART_THREADS, PARTIAL_BYTES, p);
  if (!partials) return;
  sum_partials(partials, splits.count, p.partials_stride, static_cast<float*>(gradients.sums.data), queue);
}

}  // namespace fastvit
