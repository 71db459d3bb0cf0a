// The primitives of ../primitives.h, for tensors of PyTorch.
#include "../primitives.h"

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fastvit {
namespace {

// Runs primitive `which` on the bytes of input, and writes those of output.
void run_primitive_cuda(int64_t which, const Tensor& input, const Tensor& output) {
  require(which >= 0 && which < primitive_count(), "which: ", which, "; accepted: 0 to ", primitive_count() - 1);
  const int index = static_cast<int>(which);
  Call call("input", input);
  const auto check = [](const char* name, const Tensor& tensor, const View& view, int bytes) {
    require(view.sizes[0] == bytes && tensor.is_contiguous(), name, ": expected ", bytes, " contiguous bytes, got ",
            view);
    require(reinterpret_cast<uintptr_t>(view.data) % 16 == 0, name, ": its address is not a multiple of 16");
  };
  const View in = call.read("input", input, 1, "[bytes]", {Type::UINT8});
  check("input", input, in, primitive_input_bytes(index));
  const View out = call.write("output", output, 1, "[bytes]", {Type::UINT8});
  check("output", output, out, primitive_output_bytes(index));
  run_primitive(index, in.data, out.data, call.queue());
  call.finish();
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def("run_primitive_cuda(int which, Tensor input, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  m.impl("run_primitive_cuda", TORCH_BOX(&fastvit::Guarded<&fastvit::run_primitive_cuda>::run));
}
