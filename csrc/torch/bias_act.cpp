// bias_act and bias_act_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../ops.h"
#include "blocks.h"
#include "rows.h"

namespace fastvit {
namespace {

constexpr int64_t MOST_FEATURES = 65536;  // of a row of the result

BiasActInputs read_inputs(Call& call, const Tensor& x, const MaybeTensor& bias, const MaybeTensor& up,
                          const MaybeTensor& up_bias, int64_t function, double linear, double cubic,
                          std::optional<bool> gate_last) {
  BiasActInputs inputs{};
  inputs.x = call.read_rows("x", x, FLOATS);
  const int64_t width = inputs.x.sizes[1];
  check_size("x", inputs.x, gate_last ? 2 * MOST_FEATURES : MOST_FEATURES);
  require(!gate_last || width % 2 == 0, "x: with gate_last its last size is halved; got rows ", inputs.x);
  require(!(gate_last && up), "up: with gate_last it is half of x, not a tensor of its own");
  require(up || !up_bias, "up_bias: it belongs to up, and there is none");
  require(function >= 0 && function <= 2, "function: ", function, "; accepted: 0 to 2");
  inputs.bias = read_vector(call, "bias", bias, width);
  inputs.up = read_rows(call, "up", up, "x", inputs.x);
  if (up) check_same_type("up", inputs.up, "x", inputs.x);
  inputs.up_bias = read_vector(call, "up_bias", up_bias, width);
  inputs.function = static_cast<int>(function), inputs.gate_last = gate_last;
  inputs.linear = static_cast<float>(linear), inputs.cubic = static_cast<float>(cubic);
  return inputs;
}

}  // namespace

// x and up [..., F], bias and up_bias [F], or x [..., 2F] and bias [2F] with gate_last → [..., F] in dtype; function,
// linear and cubic as fastvit/cpu/bias_act.py describes them
Tensor bias_act_cuda(const Tensor& x, const MaybeTensor& bias, const MaybeTensor& up, const MaybeTensor& up_bias,
                     int64_t function, double linear, double cubic, std::optional<bool> gate_last, ScalarType dtype) {
  Call call("x", x);
  const BiasActInputs inputs = read_inputs(call, x, bias, up, up_bias, function, linear, cubic, gate_last);
  const Type type = type_of("dtype", dtype, FLOATS);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= gate_last ? 2 : 1;
  const Tensor out = call.empty(sizes, type);
  bias_act(inputs, call.write_rows("out", out, type), call.queue());
  call.finish();
  return out;
}

// → d_x; d_up (of size 0 without up); and the float32 sums over the rows of both, one behind the other (of size 0
// without a bias)
std::tuple<Tensor, Tensor, Tensor> bias_act_backward_cuda(const Tensor& d_out, const Tensor& x, const MaybeTensor& bias,
                                                          const MaybeTensor& up, const MaybeTensor& up_bias,
                                                          int64_t function, double linear, double cubic,
                                                          std::optional<bool> gate_last) {
  Call call("x", x);
  const BiasActInputs inputs = read_inputs(call, x, bias, up, up_bias, function, linear, cubic, gate_last);
  const Type type = inputs.x.type;
  View expected = inputs.x;
  expected.sizes[1] /= gate_last ? 2 : 1;
  BiasActGradients gradients{};
  gradients.d_out = read_rows(call, "d_out", d_out, "the result", expected);
  const bool has_bias = bias || up_bias;
  const Tensor d_x = call.empty(x.sizes(), type), d_up = up ? call.empty(x.sizes(), type) : call.empty({0}, type);
  const Tensor sums = call.empty({has_bias ? inputs.x.sizes[1] * (up ? 2 : 1) : 0}, Type::FLOAT32);
  gradients.d_x = call.write_rows("d_x", d_x, type);
  if (up) gradients.d_up = call.write_rows("d_up", d_up, type);
  if (has_bias) gradients.sums = call.write("sums", sums, Type::FLOAT32);
  bias_act_backward(inputs, gradients, call.queue());
  call.finish();
  return {d_x, d_up, sums};
}

}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def(
      "bias_act_cuda(Tensor x, Tensor? bias, Tensor? up, Tensor? up_bias, int function, float linear, float cubic, "
      "bool? gate_last, ScalarType dtype) -> Tensor");
  m.def(
      "bias_act_backward_cuda(Tensor d_out, Tensor x, Tensor? bias, Tensor? up, Tensor? up_bias, int function, "
      "float linear, float cubic, bool? gate_last) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("bias_act_cuda", TORCH_BOX(&Guarded<&bias_act_cuda>::run));
  m.impl("bias_act_backward_cuda", TORCH_BOX(&Guarded<&bias_act_backward_cuda>::run));
}
