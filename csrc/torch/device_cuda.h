// A GPU as a call needs it: made current, its stream, and what launches are told of it.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../simt/queue.h"
#include "../views.h"

#define FASTVIT_NAMESPACE fastvit
#define FASTVIT_DISPATCH_KEY CUDA

namespace fastvit {

class Device {
 public:
  explicit Device(int index) : index_(index), guard_(index) {}

  void describe(simt::Queue& queue) const {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &queue.stream));
    const Properties& properties = all().at(index_);
    queue.processors = properties.processors, queue.capability = properties.capability;
  }

  // Only the emulation watches what kernels touch.
  void reads(const char*, const View&) {}
  void writes(const char*, const View&) {}
  void lends(const char*, void*, std::size_t) {}
  void finish() {}

 private:
  struct Properties {
    int processors, capability;
  };

  // Queried once: a question to the driver takes as long as a launch.
  static const std::vector<Properties>& all() {
    static const std::vector<Properties> found = [] {
      int count = 0;
      check(cudaGetDeviceCount(&count));
      std::vector<Properties> devices;
      for (int i = 0; i < count; i++) {
        devices.push_back({attribute(cudaDevAttrMultiProcessorCount, i),
                           10 * attribute(cudaDevAttrComputeCapabilityMajor, i) +
                               attribute(cudaDevAttrComputeCapabilityMinor, i)});
      }
      return devices;
    }();
    return found;
  }

  static int attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }

  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("fastvit: ") + cudaGetErrorString(error));
  }

  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fastvit
