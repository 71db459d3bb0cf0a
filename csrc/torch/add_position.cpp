// add_position and add_position_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include "../ops.h"
#include "call.h"

namespace fastvit {
namespace {

// tokens [B, N, D], pos_embed [N, D] or [R+N, D], prefix [R, D] → [B, R+N, D] in dtype
Tensor add_position_cuda(const Tensor& tokens, const Tensor& pos_embed, const MaybeTensor& prefix, ScalarType dtype) {
  Call call("tokens", tokens);
  const View in = call.read("tokens", tokens, 3, "[B, N, D]", FLOATS);
  const View positions = call.read_contiguous("pos_embed", pos_embed, 2, "[rows, D]", FLOATS);
  const View rows_before = call.read_contiguous("prefix", prefix, 2, "[R, D]", FLOATS);
  const Type type = type_of("dtype", dtype, FLOATS);
  const int64_t batch = in.sizes[0], patches = in.sizes[1], width = in.sizes[2];
  const int64_t prefix_rows = rows_before ? rows_before.sizes[0] : 0, length = prefix_rows + patches;
  check_rows("pos_embed", positions, patches, prefix_rows, width);
  require(!rows_before || rows_before.sizes[1] == width, "prefix: expected [R, ", width, "], got ", rows_before);
  check_fits("tokens", batch, length, width);

  const Tensor out = call.empty({batch, length, width}, type);
  if (batch * length * width == 0) return out;
  add_position(in, positions, rows_before, call.write("out", out, type), call.queue());
  call.finish();
  return out;
}

// grad [B, T, D] → [T, D] float32, the sum over the batch
Tensor add_position_backward_cuda(const Tensor& grad) {
  Call call("grad", grad);
  const View in = call.read_contiguous("grad", grad, 3, "[B, T, D]", FLOATS);
  check_fits("grad", in.sizes[0], in.sizes[1], in.sizes[2]);
  const Tensor d_rows = call.empty({in.sizes[1], in.sizes[2]}, Type::FLOAT32);
  add_position_backward(in, call.write("d_rows", d_rows, Type::FLOAT32), call.queue());
  call.finish();
  return d_rows;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def("add_position_cuda(Tensor tokens, Tensor pos_embed, Tensor? prefix, ScalarType dtype) -> Tensor");
  m.def("add_position_backward_cuda(Tensor grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("add_position_cuda", TORCH_BOX(&Guarded<&add_position_cuda>::run));
  m.impl("add_position_backward_cuda", TORCH_BOX(&Guarded<&add_position_backward_cuda>::run));
}
