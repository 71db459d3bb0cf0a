// Launching a kernel: on a stream of the GPU, or on the emulated one with the seed of its schedule.
#pragma once

#include "simt.h"

namespace simt {

inline int blocks_for(int64_t items, int block) { return static_cast<int>((items + block - 1) / block); }

}  // namespace simt

#if defined(__CUDACC__)

namespace simt {

struct Stream {
  cudaStream_t stream;

  template <class Parameters>
  void launch(void (*kernel)(Parameters), int x, int y, int threads, int shared_bytes, const Parameters& parameters) {
    if (x == 0 || y == 0) return;
    if (shared_bytes > 48 * 1024) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    kernel<<<dim3(x, y), threads, shared_bytes, stream>>>(parameters);
  }
};

}  // namespace simt

#else

namespace simt {

struct Stream {
  uint64_t seed;

  template <class Parameters>
  void launch(void (*kernel)(Parameters), int x, int y, int threads, int shared_bytes, const Parameters& parameters) {
    host::Block block;
    block.run({x, y}, threads, shared_bytes, seed, [&] { kernel(parameters); });
  }
};

}  // namespace simt

#endif
