// The ops over emulated kernels, for Python: tensors as addresses and strides, every access checked on the way.
//
// Knows nothing of torch: fastvit/emulated/ allocates and describes. A fault of a kernel becomes a RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../ops.h"
#include "../primitives.h"
#include "../simt/host/banks.h"
#include "../simt/host/global_memory.h"

namespace py = pybind11;

namespace fastvit {
namespace {

using simt::host::global_memory;

// What a launch is told of the GPU, and the order in which its threads run.
struct Device {
  uint64_t seed;
  int processors, capability;
};

View view_of(uintptr_t address, Type type, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  View view;
  view.is_given = true;
  view.data = reinterpret_cast<void*>(address), view.type = type, view.dimensions = static_cast<int>(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); i++) view.sizes[i] = sizes.at(i), view.strides[i] = strides.at(i);
  return view;
}

// One call of an op, with exactly its tensors in reach and the memory it asks for.
class Call {
 public:
  explicit Call(const Device& device) {
    global_memory().clear();
    queue_.allocate = &Call::allocate;
    queue_.owner = this;
    queue_.processors = device.processors, queue_.capability = device.capability, queue_.seed = device.seed;
  }
  ~Call() { global_memory().clear(); }

  void reads(std::initializer_list<std::pair<const char*, View>> views) {
    for (const auto& [name, view] : views) {
      if (view) global_memory().add_input(name, view.data, view.extent());
    }
  }
  void writes(std::initializer_list<std::pair<const char*, View>> views) {
    for (const auto& [name, view] : views) {
      if (view) global_memory().add_output(name, view.data, view.extent());
    }
  }
  const Queue& queue() const { return queue_; }
  void finish() { global_memory().check_all_written(); }

 private:
  static void* allocate(void* owner, const char* name, std::size_t bytes) {
    constexpr std::size_t ALIGNMENT = 256;
    auto& memory = static_cast<Call*>(owner)->memory_;
    memory.emplace_back(bytes + ALIGNMENT, static_cast<unsigned char>(0xff));
    void* data = memory.back().data();
    std::size_t room = memory.back().size();
    std::align(ALIGNMENT, bytes, data, room);
    global_memory().add_scratch(name, data, bytes);
    return data;
  }

  Queue queue_;
  std::deque<std::vector<unsigned char>> memory_;
};

void run_patch_embed(const Device& device, const PatchEmbedInputs& inputs, const View& tokens) {
  Call call(device);
  call.reads({{"images", inputs.images}, {"weight", inputs.weight}, {"bias", inputs.bias},
              {"positions", inputs.positions}, {"prefix", inputs.prefix}, {"keep", inputs.keep},
              {"constants", inputs.constants}});
  call.writes({{"tokens", tokens}});
  patch_embed(inputs, tokens, call.queue());
  call.finish();
}

void run_patch_embed_backward(const Device& device, const PatchEmbedInputs& inputs, int prefix_rows,
                              const PatchEmbedGradients& gradients) {
  Call call(device);
  call.reads({{"images", inputs.images}, {"weight", inputs.weight}, {"keep", inputs.keep},
              {"constants", inputs.constants}, {"grad", gradients.grad}, {"product_grad", gradients.product_grad},
              {"constants_of_images", gradients.constants_of_images}});
  call.writes({{"d_images", gradients.d_images}, {"d_weight", gradients.d_weight}, {"d_bias", gradients.d_bias},
               {"d_rows", gradients.d_rows}});
  patch_embed_backward(inputs, prefix_rows, gradients, call.queue());
  call.finish();
}

// Images are views of [1, C, H_i, W_i].
PackedImages packed_of(const std::vector<View>& images, const std::vector<int64_t>& starts, int64_t places,
                       int64_t patches, bool channels_last, const View& table) {
  return {images.data(), starts.data(), static_cast<int64_t>(images.size()), places, patches, channels_last, table};
}

void reads_packed(Call& call, const PatchEmbedInputs& inputs, const PackedImages& images) {
  call.reads({{"weight", inputs.weight}, {"bias", inputs.bias}, {"positions", inputs.positions},
              {"prefix", inputs.prefix}, {"constants", inputs.constants}, {"table", images.table}});
  for (int64_t i = 0; i < images.count; i++) call.reads({{"images", images.images[i]}});
}

void run_patch_embed_packed(const Device& device, const PatchEmbedInputs& inputs, const std::vector<View>& images,
                            const std::vector<int64_t>& starts, int64_t places, int64_t patches, bool channels_last,
                            const View& table, const View& tokens) {
  Call call(device);
  const PackedImages packed = packed_of(images, starts, places, patches, channels_last, table);
  reads_packed(call, inputs, packed);
  call.writes({{"tokens", tokens}});
  patch_embed_packed(inputs, packed, tokens, call.queue());
  call.finish();
}

void run_patch_embed_packed_backward(const Device& device, const PatchEmbedInputs& inputs,
                                     const std::vector<View>& images, const std::vector<int64_t>& starts,
                                     int64_t places, int64_t patches, bool channels_last, const View& table,
                                     int prefix_rows, const PatchEmbedGradients& gradients) {
  Call call(device);
  const PackedImages packed = packed_of(images, starts, places, patches, channels_last, table);
  reads_packed(call, inputs, packed);
  call.reads({{"grad", gradients.grad}, {"product_grad", gradients.product_grad}});
  call.writes({{"d_weight", gradients.d_weight}, {"d_bias", gradients.d_bias}, {"d_rows", gradients.d_rows}});
  patch_embed_packed_backward(inputs, packed, prefix_rows, gradients, call.queue());
  call.finish();
}

void run_add_position(const Device& device, const View& tokens, const View& positions, const View& prefix,
                      const View& out) {
  Call call(device);
  call.reads({{"tokens", tokens}, {"positions", positions}, {"prefix", prefix}});
  call.writes({{"out", out}});
  add_position(tokens, positions, prefix, out, call.queue());
  call.finish();
}

void run_add_position_backward(const Device& device, const View& grad, const View& d_rows) {
  Call call(device);
  call.reads({{"grad", grad}});
  call.writes({{"d_rows", d_rows}});
  add_position_backward(grad, d_rows, call.queue());
  call.finish();
}

void run_add_norm(const Device& device, const AddNormInputs& inputs, float eps, const View& sum, const View& normed,
                  const View& statistics) {
  Call call(device);
  call.reads({{"residual", inputs.residual}, {"branch", inputs.branch}, {"bias", inputs.bias}, {"scale", inputs.scale},
              {"keep", inputs.keep}, {"weight", inputs.weight}, {"norm_bias", inputs.norm_bias}});
  call.writes({{"sum", sum}, {"normed", normed}, {"statistics", statistics}});
  add_norm(inputs, eps, sum, normed, statistics, call.queue());
  call.finish();
}

void run_add_norm_backward(const Device& device, const AddNormInputs& inputs, const AddNormGradients& gradients) {
  Call call(device);
  call.reads({{"sum", inputs.residual}, {"branch", inputs.branch}, {"bias", inputs.bias}, {"scale", inputs.scale},
              {"keep", inputs.keep}, {"weight", inputs.weight}, {"d_normed", gradients.d_normed},
              {"d_sum", gradients.d_sum}, {"statistics", gradients.statistics}});
  call.writes({{"d_residual", gradients.d_residual}, {"d_branch", gradients.d_branch},
               {"d_vectors", gradients.d_vectors}});
  add_norm_backward(inputs, gradients, call.queue());
  call.finish();
}

void run_bias_act(const Device& device, const BiasActInputs& inputs, const View& out) {
  Call call(device);
  call.reads({{"x", inputs.x}, {"bias", inputs.bias}, {"up", inputs.up}, {"up_bias", inputs.up_bias}});
  call.writes({{"out", out}});
  bias_act(inputs, out, call.queue());
  call.finish();
}

void run_bias_act_backward(const Device& device, const BiasActInputs& inputs, const BiasActGradients& gradients) {
  Call call(device);
  call.reads({{"x", inputs.x}, {"bias", inputs.bias}, {"up", inputs.up}, {"up_bias", inputs.up_bias},
              {"d_out", gradients.d_out}});
  call.writes({{"d_x", gradients.d_x}, {"d_up", gradients.d_up}, {"sums", gradients.sums}});
  bias_act_backward(inputs, gradients, call.queue());
  call.finish();
}

void run_split_heads_backward(const Device& device, const View& d_q, const View& d_k, const View& d_v,
                              const View& d_qkv, const View& sums) {
  Call call(device);
  call.reads({{"d_q", d_q}, {"d_k", d_k}, {"d_v", d_v}});
  call.writes({{"d_qkv", d_qkv}, {"sums", sums}});
  split_heads_backward(d_q, d_k, d_v, d_qkv, sums, call.queue());
  call.finish();
}

void run_one_primitive(const Device& device, int which, const View& input, const View& output) {
  Call call(device);
  call.reads({{"input", input}});
  call.writes({{"output", output}});
  run_primitive(which, input.data, output.data, call.queue());
  call.finish();
}

}  // namespace
}  // namespace fastvit

PYBIND11_MODULE(fastvit_emulated, m) {
  using namespace fastvit;
  m.doc() = "FastViT's CUDA kernels, emulated on the host";
  py::enum_<Type>(m, "Type", py::module_local())
      .value("float32", Type::FLOAT32)
      .value("float16", Type::FLOAT16)
      .value("bfloat16", Type::BFLOAT16)
      .value("uint8", Type::UINT8)
      .value("int64", Type::INT64);
  py::register_local_exception<simt::host::Fault>(m, "Fault", PyExc_RuntimeError);
  py::class_<Device>(m, "Device", py::module_local())
      .def(py::init([](uint64_t seed, int processors, int capability) { return Device{seed, processors, capability}; }));
  py::class_<View>(m, "View", py::module_local()).def(py::init<>()).def(py::init(&view_of));
  py::class_<PatchEmbedInputs>(m, "PatchEmbedInputs", py::module_local())
      .def(py::init([](View images, View weight, View bias, View positions, View prefix, View keep, View constants,
                       Type compute, bool tf32, bool has_mean) {
        return PatchEmbedInputs{images, weight, bias, positions, prefix, keep, constants, compute, tf32, has_mean};
      }));
  py::class_<PatchEmbedGradients>(m, "PatchEmbedGradients", py::module_local())
      .def(py::init([](View grad, View product_grad, View constants_of_images, View d_images, View d_weight,
                       View d_bias, View d_rows) {
        return PatchEmbedGradients{grad, product_grad, constants_of_images, d_images, d_weight, d_bias, d_rows};
      }));
  py::class_<AddNormInputs>(m, "AddNormInputs", py::module_local())
      .def(py::init([](View residual, View branch, View bias, View scale, View keep, View weight, View norm_bias,
                       bool rms) {
        return AddNormInputs{residual, branch, bias, scale, keep, weight, norm_bias, rms};
      }));
  py::class_<AddNormGradients>(m, "AddNormGradients", py::module_local())
      .def(py::init([](View d_normed, View d_sum, View statistics, View d_residual, View d_branch, View d_vectors) {
        return AddNormGradients{d_normed, d_sum, statistics, d_residual, d_branch, d_vectors};
      }));
  py::class_<BiasActInputs>(m, "BiasActInputs", py::module_local())
      .def(py::init([](View x, View bias, View up, View up_bias, int function, float linear, float cubic,
                       std::optional<bool> gate_last) {
        return BiasActInputs{x, bias, up, up_bias, function, linear, cubic, gate_last};
      }));
  py::class_<BiasActGradients>(m, "BiasActGradients", py::module_local())
      .def(py::init([](View d_out, View d_x, View d_up, View sums) {
        return BiasActGradients{d_out, d_x, d_up, sums};
      }));
  m.def("can_read", &can_read);
  m.def("patch_embed", &run_patch_embed);
  m.def("patch_embed_backward", &run_patch_embed_backward);
  m.def("patch_embed_packed", &run_patch_embed_packed);
  m.def("patch_embed_packed_backward", &run_patch_embed_packed_backward);
  m.def("add_position", &run_add_position);
  m.def("add_position_backward", &run_add_position_backward);
  m.def("add_norm", &run_add_norm);
  m.def("add_norm_backward", &run_add_norm_backward);
  m.def("bias_act", &run_bias_act);
  m.def("bias_act_backward", &run_bias_act_backward);
  m.def("split_heads_backward", &run_split_heads_backward);
  m.def("bank_conflicts", [] { return std::exchange(simt::host::bank_conflicts(), 0); });
  m.def("primitives", [] {
    std::vector<std::tuple<std::string, int64_t, int64_t>> found;
    for (int i = 0; i < primitive_count(); i++) {
      found.emplace_back(primitive_name(i), primitive_input_bytes(i), primitive_output_bytes(i));
    }
    return found;
  });
  m.def("has_primitive", [](const Device& device, int which) { return has_primitive(which, Call(device).queue()); });
  m.def("run_primitive", &run_one_primitive);
}
