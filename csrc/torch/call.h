// One call of an op: the device its tensors are on, what kernels are told of each, and memory for as long as it lasts.
//
// Everything of torch is reached through its stable ABI, of version 2.11, so that one library serves every later torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"

#if defined(FASTVIT_NATIVE)
#include "device_native.h"
#elif defined(FASTVIT_EMULATED)
#include "device_host.h"
#else
#include "device_cuda.h"
#endif

// What went wrong in the last call of torch's; null before torch 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastvit {

using simt::Queue;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

class Call {
 public:
  // On the device of a tensor, and its current stream. The name is for messages.
  Call(const char* name, const Tensor& tensor)
      : name_(name), type_(device_type(tensor)), index_(tensor.get_device_index()), device_(index_) {
    queue_.allocate = &Call::allocate, queue_.owner = this;
    device_.describe(queue_);
  }
  Call(const Call&) = delete;

  // A tensor that kernels read as it is. The shape is for messages.
  View read(const char* name, const Tensor& tensor, int dimensions, const char* shape, Types accepted) {
    const View view = checked(name, tensor, dimensions, shape, accepted);
    device_.reads(name, view);
    return view;
  }

  // The same, or a copy of it that is contiguous.
  View read_contiguous(const char* name, const Tensor& tensor, int dimensions, const char* shape, Types accepted) {
    const View view = checked(name, tensor, dimensions, shape, accepted);
    if (!tensor.is_contiguous()) return copy(name, tensor, view.type);
    device_.reads(name, view);
    return view;
  }
  View read_contiguous(const char* name, const MaybeTensor& tensor, int dimensions, const char* shape,
                       Types accepted) {
    return tensor ? read_contiguous(name, *tensor, dimensions, shape, accepted) : View();
  }

  // A tensor [..., D] as the matrix of its rows, [rows, D]; or a copy of it that is contiguous.
  View read_rows(const char* name, const Tensor& tensor, Types accepted) {
    const Type type = checked_type(name, tensor, accepted);
    require(tensor.dim() > 0, name, ": expected dimensions [..., D], got none");
    const bool is_contiguous = tensor.is_contiguous();
    if (!is_contiguous) kept_.push_back(contiguous_copy(tensor, type));
    const Tensor& held = is_contiguous ? tensor : kept_.back();
    const View view = rows_of(held, type, const_cast<void*>(held.const_data_ptr()));
    device_.reads(name, view);
    return view;
  }

  // A contiguous copy of a tensor.
  View copy(const char* name, const Tensor& tensor, Type type) {
    kept_.push_back(contiguous_copy(tensor, type));
    const View view = describe(kept_.back(), type, const_cast<void*>(kept_.back().const_data_ptr()));
    device_.reads(name, view);
    return view;
  }

  // A given tensor whose every element kernels write.
  View write(const char* name, const Tensor& tensor, int dimensions, const char* shape, Types accepted) {
    return write(name, tensor, checked(name, tensor, dimensions, shape, accepted).type);
  }

  // A new one, of which nothing is to be checked.
  View write(const char* name, const Tensor& tensor, Type type) {
    const View view = describe(tensor, type, tensor.mutable_data_ptr());
    device_.writes(name, view);
    return view;
  }

  // The same of a tensor [..., D], as the matrix of its rows.
  View write_rows(const char* name, const Tensor& tensor, Type type) {
    const View view = rows_of(tensor, type, tensor.mutable_data_ptr());
    device_.writes(name, view);
    return view;
  }

  // A contiguous tensor on the call's device; its elements are not set.
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, Type type) const {
    int64_t strides[64], count = 1;  // of as many dimensions as torch has
    for (std::size_t i = sizes.size(); i-- > 0;) {
      strides[i] = count;
      count *= std::max<int64_t>(1, sizes[i]);
    }
    const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(torch_type(type)));
    AtenTensorHandle handle = nullptr;
    const auto error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                                type_, index_, &handle);
    if (error != TORCH_SUCCESS) refuse(count * bytes_of(type));
    return Tensor(handle);
  }

  // The same, laid out as torch lays out the like of a tensor.
  Tensor empty_like(const Tensor& tensor, Type type) const {
    try {
      return torch::stable::empty_like(tensor);
    } catch (const std::exception&) {  // nothing but the allocation can fail, and the message does not say so
      refuse(tensor.numel() * bytes_of(type));
    }
  }

  const Queue& queue() const { return queue_; }

  // To be called when all kernels are launched.
  void finish() { device_.finish(); }

 private:
  // fastvit/cuda/call.py goes by this message: the ABI has no exceptions, so that the type of torch's is lost.
  [[noreturn]] static void refuse(int64_t bytes) {
    const auto what = torch_exception_get_what_without_backtrace;
    throw std::runtime_error("fastvit: can't allocate " + std::to_string(bytes) +
                             " bytes: " + (what ? what() : "out of memory?"));
  }

  static int32_t device_type(const Tensor& tensor) {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
  }

  Type checked_type(const char* name, const Tensor& tensor, Types accepted) const {
    require(device_type(tensor) == type_ && tensor.get_device_index() == index_, name,
            ": on another device than ", name_, "; they must match");
    return type_of(name, tensor.scalar_type(), accepted);
  }

  View checked(const char* name, const Tensor& tensor, int dimensions, const char* shape, Types accepted) const {
    const Type type = checked_type(name, tensor, accepted);
    require(tensor.dim() == dimensions, name, ": expected ", dimensions, " dimensions ", shape, ", got ", tensor.dim());
    return describe(tensor, type, const_cast<void*>(tensor.const_data_ptr()));
  }

  Tensor contiguous_copy(const Tensor& tensor, Type type) const {
    Tensor copy = empty(tensor.sizes(), type);
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  static View rows_of(const Tensor& tensor, Type type, void* data) {
    const auto sizes = tensor.sizes();
    View view;
    view.is_given = true, view.data = data, view.type = type, view.dimensions = 2;
    view.sizes[0] = 1, view.sizes[1] = sizes[sizes.size() - 1];
    for (std::size_t i = 0; i + 1 < sizes.size(); i++) view.sizes[0] *= sizes[i];
    view.strides[0] = view.sizes[1], view.strides[1] = 1;
    return view;
  }

  static View describe(const Tensor& tensor, Type type, void* data) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    View view;
    view.is_given = true, view.data = data, view.type = type, view.dimensions = static_cast<int>(sizes.size());
    for (int i = 0; i < view.dimensions; i++) view.sizes[i] = sizes[i], view.strides[i] = strides[i];
    return view;
  }

  // A tensor each time: torch's allocator then knows the stream that the memory is used on, and when it is free.
  static void* allocate(void* owner, const char* name, std::size_t bytes) {
    constexpr std::size_t ALIGNMENT = 256;  // more than torch promises on the host
    Call& call = *static_cast<Call*>(owner);
    call.kept_.push_back(call.empty({static_cast<int64_t>(bytes + ALIGNMENT)}, Type::UINT8));
    const auto address = reinterpret_cast<uintptr_t>(call.kept_.back().mutable_data_ptr());
    void* data = reinterpret_cast<void*>((address + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    call.device_.lends(name, data, bytes);
    return data;
  }

  const char* name_;
  int32_t type_, index_;
  Device device_;
  Queue queue_;
  std::vector<Tensor> kept_;
};

}  // namespace fastvit
