// Where kernels are launched: a stream of a GPU, or the emulation of one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Queue {
  void* stream = nullptr;  // cudaStream_t
  // Memory for the length of a call, aligned to 256 bytes. The name is for messages.
  void* (*allocate)(void* owner, const char* name, std::size_t bytes) = nullptr;
  void* owner = nullptr;
  int processors = 132;  // multiprocessors of the device
  int capability = 80;   // 10 * major + minor
  uint64_t seed = 0;     // of the emulated schedule

  template <class T>
  T* scratch(const char* name, int64_t count) const {
    return static_cast<T*>(allocate(owner, name, static_cast<std::size_t>(count) * sizeof(T)));
  }
};

}  // namespace simt
