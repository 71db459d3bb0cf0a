// Launching a kernel: on a stream of the GPU, or in the emulation with the seed of its schedule.
#pragma once

#include "queue.h"
#include "simt.h"

#include <stdexcept>
#include <string>

namespace simt {

inline int blocks_for(int64_t items, int block) { return static_cast<int>((items + block - 1) / block); }

// Runs a grid of x by y blocks, in clusters of so many neighbours in x; nothing where there are none.
//
// Throws std::runtime_error: CUDA refused the launch. (simt::host::Fault: the emulated kernel did what it must not.)
template <class Parameters>
void launch(const Queue& queue, void (*kernel)(Parameters), int x, int y, int threads, int shared_bytes,
            const Parameters& parameters, int cluster = 1) {
  if (x == 0 || y == 0) return;
#if defined(SIMT_NO_LAUNCH)  // all of a call but the kernels: what the host costs
  (void)queue, (void)kernel, (void)threads, (void)shared_bytes, (void)parameters, (void)cluster;
#elif defined(__CUDACC__)
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster, size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(x, y), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(queue.stream);
    config.attrs = &size, config.numAttrs = cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, parameters);
  }
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // which CUDA remembers: the thread's next launch, though healthy, would report it
    throw std::runtime_error("fastvit: CUDA refuses a launch of " + std::to_string(x) + " x " + std::to_string(y) +
                             " blocks of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared_bytes) + " bytes of shared memory: " + cudaGetErrorString(error));
  }
#else
  if (y > 65535) throw std::runtime_error("a grid of more than 65535 blocks in y");
  host::global_memory().start_launch();
  host::Cluster().run({x, y}, cluster, threads, shared_bytes, queue.seed, [&] { kernel(parameters); });
#endif
}

}  // namespace simt
