// add_norm and add_norm_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../ops.h"
#include "blocks.h"
#include "rows.h"

namespace fastvit {
namespace {

constexpr int64_t MOST_VALUES = 8192;  // of a row

// Everything but the branch.
AddNormInputs read_inputs(Call& call, const char* name, const Tensor& residual, const MaybeTensor& bias,
                          const MaybeTensor& scale, const MaybeTensor& keep, const Tensor& weight,
                          const MaybeTensor& norm_bias, bool rms) {
  AddNormInputs inputs{};
  inputs.residual = call.read_rows(name, residual, FLOATS);
  const int64_t width = inputs.residual.sizes[1];
  check_size(name, inputs.residual, MOST_VALUES);
  inputs.bias = read_vector(call, "bias", bias, width), inputs.scale = read_vector(call, "scale", scale, width);
  inputs.keep = call.read_contiguous("keep", keep, 1, "[B]", {Type::FLOAT32});
  const bool fits = residual.dim() > 1 && inputs.keep.sizes[0] == residual.size(0);
  require(!keep || fits, "keep: expected a value a sample of ", name, ", got ", inputs.keep);
  inputs.weight = read_vector(call, "weight", weight, width);
  inputs.norm_bias = read_vector(call, "norm_bias", norm_bias, width);
  inputs.rms = rms;
  return inputs;
}

}  // namespace

// residual and branch [..., D], vectors [D], keep [B] → sum in sum_dtype (of size 0 without a branch), normed in dtype,
// and [2, rows] float32: mean and 1/deviation of every row
std::tuple<Tensor, Tensor, Tensor> add_norm_cuda(const Tensor& residual, const MaybeTensor& branch,
                                                 const MaybeTensor& bias, const MaybeTensor& scale,
                                                 const MaybeTensor& keep, const Tensor& weight,
                                                 const MaybeTensor& norm_bias, double eps, bool rms,
                                                 ScalarType sum_dtype, ScalarType dtype) {
  Call call("residual", residual);
  AddNormInputs inputs = read_inputs(call, "residual", residual, bias, scale, keep, weight, norm_bias, rms);
  inputs.branch = read_rows(call, "branch", branch, "residual", inputs.residual);
  const Type sum_type = type_of("sum_dtype", sum_dtype, FLOATS), type = type_of("dtype", dtype, FLOATS);

  const Tensor sum = branch ? call.empty(residual.sizes(), sum_type) : call.empty({0}, sum_type);
  const Tensor normed = call.empty(residual.sizes(), type);
  const Tensor statistics = call.empty({2, inputs.residual.sizes[0]}, Type::FLOAT32);
  const View sum_rows = branch ? call.write_rows("sum", sum, sum_type) : View();
  add_norm(inputs, static_cast<float>(eps), sum_rows, call.write_rows("normed", normed, type),
           call.write("statistics", statistics, Type::FLOAT32), call.queue());
  call.finish();
  return {sum, normed, statistics};
}

// → d_residual in residual_dtype; d_branch in the branch's, of size 0 where it is d_residual or there is no branch; and
// [vectors, D] float32: of weight, norm_bias, bias, scale, those that are there. Without a scale nothing of the branch is
// looked at but its dtype.
std::tuple<Tensor, Tensor, Tensor> add_norm_backward_cuda(
    const Tensor& total, const Tensor& d_normed, const MaybeTensor& d_total, const MaybeTensor& branch,
    const MaybeTensor& bias, const MaybeTensor& scale, const MaybeTensor& keep, const Tensor& weight,
    const MaybeTensor& norm_bias, const Tensor& statistics, bool rms, ScalarType residual_dtype) {
  Call call("total", total);
  AddNormInputs inputs = read_inputs(call, "total", total, bias, scale, keep, weight, norm_bias, rms);
  const int64_t rows = inputs.residual.sizes[0], width = inputs.residual.sizes[1];
  const Type residual_type = type_of("residual_dtype", residual_dtype, FLOATS);
  const Type branch_type = branch ? type_of("branch", branch->scalar_type(), FLOATS) : residual_type;
  require(branch || !(scale || keep), "scale, keep: they belong to the branch, and there is none");
  if (scale) inputs.branch = read_rows(call, "branch", branch, "total", inputs.residual);
  AddNormGradients gradients{};
  gradients.d_normed = read_rows(call, "d_normed", d_normed, "total", inputs.residual);
  gradients.d_sum = read_rows(call, "d_total", d_total, "total", inputs.residual);
  gradients.statistics = call.read_contiguous("statistics", statistics, 2, "[2, rows]", {Type::FLOAT32});
  require(gradients.statistics.sizes[0] == 2 && gradients.statistics.sizes[1] == rows, "statistics: expected [2, ",
          rows, "], got ", gradients.statistics);

  const bool is_apart = scale || keep || branch_type != residual_type;
  const Tensor d_residual = call.empty(total.sizes(), residual_type);
  const Tensor d_branch = is_apart ? call.empty(total.sizes(), branch_type) : call.empty({0}, branch_type);
  const int64_t vectors = 1 + bool(norm_bias) + bool(bias) + bool(scale);
  const Tensor d_vectors = call.empty({vectors, width}, Type::FLOAT32);
  gradients.d_residual = call.write_rows("d_residual", d_residual, residual_type);
  if (is_apart) gradients.d_branch = call.write_rows("d_branch", d_branch, branch_type);
  gradients.d_vectors = call.write("d_vectors", d_vectors, Type::FLOAT32);
  add_norm_backward(inputs, gradients, call.queue());
  call.finish();
  return {d_residual, d_branch, d_vectors};
}

}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def(
      "add_norm_cuda(Tensor residual, Tensor? branch, Tensor? bias, Tensor? scale, Tensor? keep, Tensor weight, "
      "Tensor? norm_bias, float eps, bool rms, ScalarType sum_dtype, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_norm_backward_cuda(Tensor total, Tensor d_normed, Tensor? d_total, Tensor? branch, Tensor? bias, "
      "Tensor? scale, Tensor? keep, Tensor weight, Tensor? norm_bias, Tensor statistics, bool rms, "
      "ScalarType residual_dtype) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("add_norm_cuda", TORCH_BOX(&Guarded<&add_norm_cuda>::run));
  m.impl("add_norm_backward_cuda", TORCH_BOX(&Guarded<&add_norm_backward_cuda>::run));
}
