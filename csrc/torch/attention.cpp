// attention and attention_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../ops.h"
#include "rows.h"

namespace fastvit {
namespace {

constexpr int64_t MOST_TOKENS = 640;  // the backward has scores of a whole head in memory; as fastvit/native/attention.py

struct Packed {
  View qkv;
  int64_t batch, tokens, width;

  Packed(Call& call, const Tensor& tensor, int64_t heads)
      : qkv(call.read_contiguous("qkv", tensor, 3, "[B, T, 3D]", FLOATS)), batch(qkv.sizes[0]),
        tokens(qkv.sizes[1]), width(qkv.sizes[2] / 3) {
    require(heads > 0 && qkv.sizes[2] % (3 * heads) == 0 && qkv.sizes[2] > 0, "qkv: expected [B, T, 3D] of ", heads,
            " heads, got ", qkv);
    require(tokens <= MOST_TOKENS, "qkv: ", tokens, " tokens; they must be at most ", MOST_TOKENS);
    check_fits("qkv", batch, tokens, 3 * width);
  }
};

// [B, T, 3D] → [B, T, D] and the logarithms [B, H, T] of the sums of exponentials
std::tuple<Tensor, Tensor> attention_cuda(const Tensor& qkv, int64_t heads, double scale) {
  Call call("qkv", qkv);
  const Packed packed(call, qkv, heads);
  const Tensor out = call.empty({packed.batch, packed.tokens, packed.width}, packed.qkv.type);
  const Tensor logsums = call.empty({packed.batch, heads, packed.tokens}, Type::FLOAT32);
  attention(packed.qkv, heads, static_cast<float>(scale), call.write("out", out, packed.qkv.type),
            call.write("logsums", logsums, Type::FLOAT32), call.queue());
  call.finish();
  return {out, logsums};
}

// [B, T, D] → [B, T, 3D]; and its float32 sums over batch and tokens (of size 0 without a bias)
std::tuple<Tensor, Tensor> attention_backward_cuda(const Tensor& grad, const Tensor& qkv, const Tensor& logsums,
                                                   int64_t heads, double scale, bool has_bias) {
  Call call("qkv", qkv);
  const Packed packed(call, qkv, heads);
  const int64_t tokens[] = {packed.batch, packed.tokens, packed.width}, rows[] = {packed.batch, heads, packed.tokens};
  const View grad_view = call.read_contiguous("grad", grad, 3, "[B, T, D]", {packed.qkv.type});
  const View logsums_view = call.read_contiguous("logsums", logsums, 3, "[B, H, T]", {Type::FLOAT32});
  for (int i = 0; i < 3; i++) {
    require(grad_view.sizes[i] == tokens[i], "grad: shape ", grad_view, " does not fit qkv ", packed.qkv);
    require(logsums_view.sizes[i] == rows[i], "logsums: shape ", logsums_view, " does not fit qkv ", packed.qkv);
  }
  const Tensor d_qkv = call.empty({packed.batch, packed.tokens, 3 * packed.width}, packed.qkv.type);
  const Tensor sums = call.empty({has_bias ? 3 * packed.width : 0}, Type::FLOAT32);
  const View sums_view = has_bias ? call.write("sums", sums, Type::FLOAT32) : View();
  attention_backward(packed.qkv, heads, static_cast<float>(scale), grad_view, logsums_view,
                     call.write("d_qkv", d_qkv, packed.qkv.type), sums_view, call.queue());
  call.finish();
  return {d_qkv, sums};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def("attention_cuda(Tensor qkv, SymInt heads, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward_cuda(Tensor grad, Tensor qkv, Tensor logsums, SymInt heads, float scale, bool has_bias) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("attention_cuda", TORCH_BOX(&Guarded<&attention_cuda>::run));
  m.impl("attention_backward_cuda", TORCH_BOX(&Guarded<&attention_backward_cuda>::run));
}
