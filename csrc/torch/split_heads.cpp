// split_heads_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../ops.h"
#include "blocks.h"
#include "rows.h"

namespace fastvit {
namespace {

View read_heads(Call& call, const char* name, const Tensor& gradient) {
  return call.read(name, gradient, 4, "[B, H, T, D/H]", FLOATS);
}

void check_like(const char* name, const View& gradient, const View& d_q) {
  const bool fits = std::equal(gradient.sizes, gradient.sizes + 4, d_q.sizes);
  require(fits, name, ": shape ", gradient, ", but d_q has ", d_q, "; they must match");
  check_same_type(name, gradient, "d_q", d_q);
}

}  // namespace

// Three of [B, H, T, D/H], of any strides → [B, T, 3D]; and its float32 sums over batch and tokens (of size 0 without a
// bias)
std::tuple<Tensor, Tensor> split_heads_backward_cuda(const Tensor& d_q, const Tensor& d_k, const Tensor& d_v,
                                                     bool has_bias) {
  Call call("d_q", d_q);
  const View q = read_heads(call, "d_q", d_q), k = read_heads(call, "d_k", d_k), v = read_heads(call, "d_v", d_v);
  check_like("d_k", k, q), check_like("d_v", v, q);
  const int64_t batch = q.sizes[0], tokens = q.sizes[2], width = q.sizes[1] * q.sizes[3];
  require(width > 0, "d_q: expected [B, H, T, D/H] with heads of some width, got ", q);
  check_fits("d_q", batch, tokens, 3 * width);
  require(batch * tokens < ROWS_LIMIT, "d_q: ", batch, " x ", tokens, " rows; they must be < 2^30");
  const Tensor d_qkv = call.empty({batch, tokens, 3 * width}, q.type);
  const Tensor sums = call.empty({has_bias ? 3 * width : 0}, Type::FLOAT32);
  const View sums_view = has_bias ? call.write("sums", sums, Type::FLOAT32) : View();
  split_heads_backward(q, k, v, call.write("d_qkv", d_qkv, q.type), sums_view, call.queue());
  call.finish();
  return {d_qkv, sums};
}

}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def("split_heads_backward_cuda(Tensor d_q, Tensor d_k, Tensor d_v, bool has_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("split_heads_backward_cuda", TORCH_BOX(&Guarded<&split_heads_backward_cuda>::run));
}
