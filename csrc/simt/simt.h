// The primitives that kernels are written with: PTX under nvcc, an emulation of it under a host compiler.
//
// Kernels reach threads, barriers and shared memory through namespace simt alone, so that one source is compiled for a
// GPU and run, checked access by access, on a machine that has none. See host/cluster.h for what the emulation checks,
// and ../primitives.cu for the kernels that hold it to a GPU.
#pragma once

#include <cstdint>
#include <type_traits>

namespace simt {

using shared_address = uint32_t;  // bytes from the start of a block's shared memory window

// WORDS 32-bit registers that are loaded and stored as one, at an address that their size divides.
template <int WORDS>
struct alignas(4 * WORDS) Vector {
  static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "loads are 4, 8 or 16 bytes wide");
  uint32_t word[WORDS];
};

// Columns of the one shape that warpgroups multiply in here, and the sums that a thread has of 64 rows of them.
constexpr int WARPGROUP_COLUMNS = 192;
using WarpgroupSums = float[WARPGROUP_COLUMNS / 8][4];

// Registers of a multiprocessor; those that each thread has of a block which is launched alone on one; whether a
// warpgroup may ask for as many a thread.
constexpr int REGISTERS = 65536;
template <int THREADS>
constexpr int REGISTERS_AT_LAUNCH = REGISTERS / THREADS / 8 * 8;
template <int COUNT>
constexpr bool IS_REGISTER_COUNT = COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0;

}  // namespace simt

#if defined(__CUDACC__)
#include "device.h"
#else
#include "host/bulk.h"
#include "host/primitives.h"
#include "host/warpgroup.h"
#endif
