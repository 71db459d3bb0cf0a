// The norm of half a block and the products behind it, forward and backward, each in one call: what
// fastvit/half_block.py does op by op, for hosts that launches would wait for. The products are torch's.
#include <torch/csrc/stable/library.h>

#include <array>
#include <vector>

#include "blocks.h"

namespace fastvit {
namespace {

constexpr int64_t NO_FUNCTION = -1;  // of a product alone

// A tensor that an op of torch's returns.
template <class... Arguments>
Tensor call_torch(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor cast(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  const Tensor found = Call("tensor", tensor).empty(tensor.sizes(), type_of("dtype", dtype, FLOATS));
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(found.get(), tensor.get(), 0));
  return found;
}

MaybeTensor cast(const MaybeTensor& tensor, ScalarType dtype) {
  return tensor ? MaybeTensor(cast(*tensor, dtype)) : MaybeTensor();
}

// The memory of a tensor in another shape, without torch's dispatcher.
Tensor view(const Tensor& tensor, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
            int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.begin(), strides.begin(),
                                                        tensor.storage_offset() + offset, &handle));
  return Tensor(handle);
}

// Matrices one below the other in one memory, each copied once.
Tensor stack_rows(const Tensor& first, const std::vector<Tensor>& below, ScalarType dtype) {
  if (below.empty()) return cast(first, dtype);
  const int64_t height = first.size(0), width = first.size(1), count = 1 + static_cast<int64_t>(below.size());
  const Tensor found = Call("first", first).empty(std::vector<int64_t>{count * height, width},
                                                  type_of("dtype", dtype, FLOATS));
  for (int64_t part = 0; part < count; ++part) {
    const Tensor place = view(found, {height, width}, {width, 1}, part * height * width);
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(place.get(), (part ? below[part - 1] : first).get(), 0));
  }
  return found;
}

// A tensor [..., D] as the matrix of its rows, or of a copy of them that is contiguous.
Tensor rows(const Tensor& tensor) {
  if (tensor.dim() == 2) return tensor;
  const Tensor held = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const int64_t width = tensor.size(tensor.dim() - 1);
  return view(held, {width ? tensor.numel() / width : 0, width}, {width, 1});
}

// Rows [B·T, F], which were made from those of a tensor [B, T, D], as [B, T, F].
Tensor like(const Tensor& made, const Tensor& tensor) {
  const int64_t width = made.size(1), tokens = tensor.size(1);
  return view(made, {tensor.size(0), tokens, width}, {tokens * width, width, 1});
}

Tensor transposed(const Tensor& matrix) {
  return view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// x [N, D], weight [F, D], bias [F] → [N, F]
Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  return call_torch("aten::linear", x, weight, bias);
}

// Checks of what torch's products are given, whose own messages name nothing.

void check_type(const char* name, const Tensor& tensor, ScalarType dtype, const char* as_name) {
  require(tensor.scalar_type() == dtype, name, ": dtype ", torch::headeronly::toString(tensor.scalar_type()), ", but ",
          as_name, " has ", torch::headeronly::toString(dtype), "; they must match");
}

// A weight of as many columns as `width`, beside `tensor`; "rows" is what its rows are called.
void check_weight(const char* name, const Tensor& weight, const char* rows, int64_t width, const Tensor& tensor) {
  type_of(name, weight.scalar_type(), FLOATS);
  require(weight.dim() == 2, name, ": expected 2 dimensions [", rows, ", ...], got ", weight.dim());
  require(weight.size(1) == width, name, ": expected [", rows, ", ", width, "], got [", weight.size(0), ", ",
          weight.size(1), "]");
  require(weight.get_device_index() == tensor.get_device_index(), name, ": on another device than the residual");
}

void check_vector(const char* name, const MaybeTensor& vector, int64_t width) {
  if (!vector) return;
  type_of(name, vector->scalar_type(), FLOATS);
  require(vector->dim() == 1, name, ": expected 1 dimensions [D], got ", vector->dim());
  require(vector->size(0) == width, name, ": expected [", width, "], got [", vector->size(0), "]");
}

void check_matrix(const char* name, const Tensor& matrix, int64_t rows, int64_t width) {
  require(matrix.dim() == 2, name, ": expected 2 dimensions, got ", matrix.dim());
  require(matrix.size(0) == rows && matrix.size(1) == width, name, ": expected [", rows, ", ", width, "], got [",
          matrix.size(0), ", ", matrix.size(1), "]");
}

Tensor multiply(const Tensor& left, const Tensor& right) { return call_torch("aten::mm", left, right); }

// add_norm's arguments, of which the branch is still to be multiplied by `before` [D, D'] where that is given; weights
// first [F, D], which goes on in those below it, and second [D'', F] with their biases, the first being the
// activation's, or, without a function, that of a product that is then alone → sum, normed, statistics, the result, and
// first in dtype; with a function what it was given, what it gave, and second in dtype; with `before` the branch, and
// before in its dtype. What is neither sum, result nor branch is made of rows: [N, D], N being the rows of the residual
std::vector<Tensor> half_block_cuda(const Tensor& residual, const MaybeTensor& branch, const MaybeTensor& bias,
                                    const MaybeTensor& scale, const MaybeTensor& keep, const Tensor& weight,
                                    const MaybeTensor& norm_bias, const MaybeTensor& before, const Tensor& first,
                                    const MaybeTensor& first_bias, const MaybeTensor& second,
                                    const MaybeTensor& last_bias, std::vector<Tensor> below, double eps, bool rms,
                                    ScalarType sum_dtype, ScalarType dtype, int64_t function, double linear_term,
                                    double cubic_term) {
  require(residual.dim() == 3, "residual: expected [B, T, D], got ", residual.dim(), " dimensions");
  require(branch || !before, "before: it makes the branch, and there is none");
  const int64_t width = residual.size(2);
  if (before) {
    type_of("branch", branch->scalar_type(), FLOATS);
    require(branch->dim() == 3, "branch: expected [B, T, D'], got ", branch->dim(), " dimensions");
    check_weight("before", *before, "D", branch->size(2), residual);
  }
  check_weight("first", first, "F", width, residual);
  for (const Tensor& weight : below) {
    check_matrix("below", weight, first.size(0), width);
    check_weight("below", weight, "F", width, residual);
  }
  const int64_t features = first.size(0) * (1 + static_cast<int64_t>(below.size()));
  check_vector("first_bias", first_bias, features);
  const MaybeTensor cast_before = before ? cast(before, branch->scalar_type()) : before;
  const MaybeTensor added = before ? MaybeTensor(like(linear(rows(*branch), *cast_before, {}), *branch)) : branch;
  const auto [sum, normed, statistics] =
      add_norm_cuda(residual, added, bias, scale, keep, weight, norm_bias, eps, rms, sum_dtype, dtype);
  const Tensor cast_first = stack_rows(first, below, dtype), normed_rows = rows(normed);
  std::vector<Tensor> made{sum, normed_rows, statistics};
  if (function == NO_FUNCTION) {
    made.insert(made.end(), {like(linear(normed_rows, cast_first, cast(first_bias, dtype)), residual), cast_first});
  } else {
    require(second.has_value(), "second: there is none behind the activation");
    check_weight("second", *second, "D''", features, residual);
    check_vector("last_bias", last_bias, second->size(0));
    const Tensor hidden = linear(normed_rows, cast_first, {}), cast_second = cast(*second, dtype);
    const Tensor active = bias_act_cuda(hidden, first_bias, {}, {}, function, linear_term, cubic_term, {}, dtype);
    const Tensor result = linear(active, cast_second, cast(last_bias, dtype));
    made.insert(made.end(), {like(result, residual), cast_first, hidden, active, cast_second});
  }
  if (before) made.insert(made.end(), {*added, *cast_before});
  return made;
}

// The rows of a matrix, each in the dtype of its vector; an absent vector has none.
void append_rows(std::vector<Tensor>& found, const Tensor& matrix, std::initializer_list<const MaybeTensor*> vectors) {
  int64_t row = 0;
  for (const MaybeTensor* vector : vectors) {
    if (!*vector) continue;
    const int64_t width = matrix.size(1);
    found.push_back(cast(view(matrix, {width}, {1}, width * row++), (*vector)->scalar_type()));
  }
}

// The gradients of sum and result, or, with d_k and d_v, of queries, keys and values of which the result consists,
// whose bias has a gradient then; add_norm_backward's arguments, of which `branch` is read with a scale alone; what the
// forward multiplied by `before`, and before as it cast it; normed, the parameters, and what else the forward made →
// the gradients of those of residual, branch (or what `before` multiplied), weight, norm_bias, bias, scale, before,
// first and what is below it, first_bias (of an activation, or of heads) and second that are there; of size 0 for a
// weight whose gradient is not needed
std::vector<Tensor> half_block_backward_cuda(
    const MaybeTensor& d_sum, const Tensor& d_result, const MaybeTensor& d_k, const MaybeTensor& d_v, const Tensor& sum,
    const MaybeTensor& branch, const MaybeTensor& bias, const MaybeTensor& scale, const MaybeTensor& keep,
    const Tensor& weight, const MaybeTensor& norm_bias, const Tensor& statistics, const MaybeTensor& before,
    const Tensor& first, const MaybeTensor& first_bias, const MaybeTensor& second, const MaybeTensor& x,
    const Tensor& normed, const Tensor& cast_first, const MaybeTensor& hidden, const MaybeTensor& active,
    const MaybeTensor& cast_second, const MaybeTensor& cast_before, bool rms, ScalarType residual_dtype,
    int64_t function, double linear_term, double cubic_term, bool needs_before, bool needs_first, bool needs_second) {
  require(sum.dim() == 3, "sum: expected [B, T, D], got ", sum.dim(), " dimensions");
  require(function != NO_FUNCTION ? !d_k && !d_v : d_k.has_value() == d_v.has_value(),
          "d_k: it comes with d_v, and without an activation");
  const int64_t row_count = sum.size(0) * sum.size(1), width = sum.size(2);
  check_weight("first", first, "F", width, sum);
  require(cast_first.dim() == 2, "cast_first: expected 2 dimensions, got ", cast_first.dim());
  const int64_t height = first.size(0), features = cast_first.size(0);  // what lies below first is in the latter alone
  check_matrix("cast_first", cast_first, height && features && features % height == 0 ? features : height, width);
  check_matrix("normed", normed, row_count, width);
  check_type("normed", normed, cast_first.scalar_type(), "cast_first");
  if (before) {
    require(branch.has_value(), "branch: it has a weight before it, and is missing");
    require(x && cast_before, "x, cast_before: they come with before, and one of them is missing");
    check_weight("before", *before, "D", x->dim() ? x->size(x->dim() - 1) : 0, sum);
    check_matrix("cast_before", *cast_before, width, before->size(1));
    check_type("cast_before", *cast_before, branch->scalar_type(), "branch");
    check_type("x", *x, branch->scalar_type(), "branch");
  }
  const auto weight_gradient_of = [&](bool is_needed, const Tensor& grad, const Tensor& given,
                                      const Tensor& parameter) {
    if (!is_needed) return torch::stable::new_empty(statistics, {0});
    return cast(multiply(transposed(grad), given), parameter.scalar_type());
  };
  std::vector<Tensor> of_products;
  MaybeTensor d_packed(d_result);
  if (d_k) {
    const auto [d_qkv, sums] = split_heads_backward_cuda(d_result, *d_k, *d_v, first_bias.has_value());
    d_packed = d_qkv;
    if (first_bias) of_products.push_back(cast(sums, first_bias->scalar_type()));
  }
  require(d_packed->dim() > 0, "d_result: expected [B, T, F], got no dimensions");
  const Tensor d_rows = rows(*d_packed);
  MaybeTensor d_hidden(d_rows);
  if (function == NO_FUNCTION) {
    check_matrix("d_result", d_rows, row_count, features);
    check_type("d_result", d_rows, cast_first.scalar_type(), "cast_first");
  } else {
    require(hidden && active && second && cast_second, "hidden, active, second: one of them is missing");
    check_weight("second", *second, "D''", features, sum);
    check_matrix("cast_second", *cast_second, second->size(0), features);
    check_matrix("hidden", *hidden, row_count, features);
    check_matrix("active", *active, row_count, features);
    check_matrix("d_result", d_rows, row_count, second->size(0));
    check_type("d_result", d_rows, cast_second->scalar_type(), "cast_second");
    check_type("active", *active, cast_second->scalar_type(), "cast_second");
    const Tensor d_active = multiply(d_rows, *cast_second);
    const auto [d_x, d_up, sums] =
        bias_act_backward_cuda(d_active, *hidden, first_bias, {}, {}, function, linear_term, cubic_term, {});
    if (first_bias) of_products.push_back(cast(sums, first_bias->scalar_type()));
    of_products.push_back(weight_gradient_of(needs_second, d_rows, *active, *second));
    d_hidden = d_x;
  }
  of_products.insert(of_products.begin(), weight_gradient_of(needs_first, *d_hidden, normed, first));
  const Tensor d_normed = multiply(*d_hidden, cast_first);
  const auto [d_residual, d_apart, d_vectors] = add_norm_backward_cuda(
      sum, d_normed, d_sum, branch, bias, scale, keep, weight, norm_bias, statistics, rms, residual_dtype);

  const MaybeTensor gain(weight);
  std::vector<Tensor> found{d_residual};
  const bool is_apart = scale || keep || (branch && branch->scalar_type() != residual_dtype);
  const Tensor& d_branch = is_apart ? d_apart : d_residual;
  const Tensor branch_rows = before ? rows(d_branch) : d_branch;
  const MaybeTensor x_rows = before ? MaybeTensor(rows(*x)) : MaybeTensor();
  if (before) check_matrix("x", *x_rows, row_count, before->size(1));
  if (branch) found.push_back(before ? like(multiply(branch_rows, *cast_before), sum) : d_branch);
  append_rows(found, d_vectors, {&gain, &norm_bias, &bias, &scale});
  if (before) found.push_back(weight_gradient_of(needs_before, branch_rows, *x_rows, *before));
  found.insert(found.end(), of_products.begin(), of_products.end());
  return found;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def(
      "half_block_cuda(Tensor residual, Tensor? branch, Tensor? bias, Tensor? scale, Tensor? keep, Tensor weight, "
      "Tensor? norm_bias, Tensor? before, Tensor first, Tensor? first_bias, Tensor? second, Tensor? last_bias, "
      "Tensor[] below, float eps, bool rms, ScalarType sum_dtype, ScalarType dtype, int function, float linear, float "
      "cubic) -> Tensor[]");
  m.def(
      "half_block_backward_cuda(Tensor? d_sum, Tensor d_result, Tensor? d_k, Tensor? d_v, Tensor sum, Tensor? branch, "
      "Tensor? bias, Tensor? scale, Tensor? keep, Tensor weight, Tensor? norm_bias, Tensor statistics, Tensor? "
      "before, Tensor first, Tensor? first_bias, Tensor? second, Tensor? x, Tensor normed, Tensor cast_first, Tensor? "
      "hidden, Tensor? active, Tensor? cast_second, Tensor? cast_before, bool rms, ScalarType residual_dtype, int "
      "function, float linear, float cubic, bool needs_before, bool needs_first, bool needs_second) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("half_block_cuda", TORCH_BOX(&Guarded<&half_block_cuda>::run));
  m.impl("half_block_backward_cuda", TORCH_BOX(&Guarded<&half_block_backward_cuda>::run));
}
