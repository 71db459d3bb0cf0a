// Launching a kernel: on a stream of the GPU, or in the emulation with the seed of its schedule.
#pragma once

#include "queue.h"
#include "simt.h"

#if defined(__CUDACC__)
#include <stdexcept>
#include <string>
#endif

namespace simt {

inline int blocks_for(int64_t items, int block) { return static_cast<int>((items + block - 1) / block); }

// Runs a grid of x by y blocks; nothing where there are none.
//
// Throws std::runtime_error: CUDA refused the launch. (simt::host::Fault: the emulated kernel did what it must not.)
template <class Parameters>
void launch(const Queue& queue, void (*kernel)(Parameters), int x, int y, int threads, int shared_bytes,
            const Parameters& parameters) {
  if (x == 0 || y == 0) return;
#if defined(SIMT_NO_LAUNCH)  // all of a call but the kernels: what the host costs
  (void)queue, (void)kernel, (void)threads, (void)shared_bytes, (void)parameters;
#elif defined(__CUDACC__)
  if (shared_bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  kernel<<<dim3(x, y), threads, shared_bytes, static_cast<cudaStream_t>(queue.stream)>>>(parameters);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("fastvit: ") + cudaGetErrorString(error));
#else
  host::global_memory().start_launch();
  host::Block block;
  block.run({x, y}, threads, shared_bytes, queue.seed, [&] { kernel(parameters); });
#endif
}

}  // namespace simt
