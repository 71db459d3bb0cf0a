// A thread of the emulated cluster: its fiber, and what it has started and not yet waited for.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "clock.h"
#include "fault.h"
#include "fiber.h"

namespace simt::host {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;

// One cp.async of one thread.
struct Copy {
  uint32_t target;
  const void* source;  // null where zeros are to arrive
  int bytes;
  bool arrived;
};

// One load from shared memory.
struct SharedLoad {
  uint32_t address;
  int bytes;
};

// The share of one thread in a wgmma: what it has learnt when it has waited, and where its sums lie.
struct ProductShare {
  Event finished;
  float* sums;
};

// Sums of one thread that products in flight add to. They are kept here, and those of the kernel are NaN until then.
struct PendingSums {
  static constexpr int COUNT = WARPGROUP_COLUMNS / 2;
  float* place;
  std::vector<float> values;
  int products;
};

struct Thread {
  Context context;
  int index = 0;  // in the cluster
  int registers = 0;
  Clock clock;
  std::vector<Copy> open_copies;              // started, not yet committed
  std::deque<std::vector<Copy>> copies;       // committed, not yet waited for
  bool has_arrived = false;                   // a wgmma may start: its sums are where the tensor cores may find them
  std::vector<ProductShare> open_products;
  std::deque<std::vector<ProductShare>> products;
  std::vector<PendingSums> sums;
  std::vector<SharedLoad> loads;              // since the last operation of the warp or barrier
  void (*operation)() = nullptr;              // what it waits to do with its warp or warpgroup
  void* operands = nullptr;

  int warp() const { return index / WARP; }
  int lane() const { return index % WARP; }

  // A thread must have waited for all that it has started.
  void check_finished() const {
    if (!open_copies.empty()) fail("a thread ends with copies that were not committed");
    for (const auto& group : copies) {
      if (!group.empty()) fail("a thread ends with copies in flight");
    }
    if (!open_products.empty()) fail("a thread ends with a wgmma that was not committed");
    for (const auto& group : products) {
      if (!group.empty()) fail("a thread ends with a wgmma in flight");
    }
  }
};

}  // namespace simt::host
