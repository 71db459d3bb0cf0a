// wgmma, emulated: a warpgroup multiplies operands that lie in shared memory, while its threads go on.
//
// The product is computed when the last thread arrives. Until a thread's wait its sums are NaN, and only behind the waits
// of all may the operands be written. See SharedMemory::read_operand for what must come before.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "cluster.h"
#include "number.h"

namespace simt {
namespace host {

// What a descriptor says of a matrix of 16-bit values: rows of 128 bytes, swizzled, eight of them in 1024 bytes. A row
// is one of the matrix's, or, transposed, one value of the reduction for each of 64 rows: a panel.
template <bool TRANSPOSED>
class Operand {
 public:
  explicit Operand(uint64_t descriptor)
      : start_(field(descriptor, 0)), panel_(field(descriptor, 16)), stride_(field(descriptor, 32)) {
    if (descriptor >> 62 != 1) fail("wgmma: only the swizzle of 128 bytes is emulated");
    if (start_ >> 7 & 7) fail("wgmma: the descriptor does not start in the first row of 1024 aligned bytes");
    if (start_ % ROW_BYTES > (TRANSPOSED ? 0 : ROW_BYTES - 32)) {
      fail("wgmma: what is read from the descriptor's start on leaves a row");
    }
  }

  // Of eight values, as they lie in memory. The swizzle is one of address bits: 4 to 6 are changed by 7 to 9.
  uint32_t address(int row, int k) const {
    const int line = TRANSPOSED ? k : row, across = TRANSPOSED ? row % 64 : k;
    const uint32_t linear = start_ + (TRANSPOSED ? row / 64 * panel_ : 0) + line / 8 * stride_ + line % 8 * ROW_BYTES +
                            static_cast<uint32_t>(across) * 2;
    return linear ^ (linear >> 7 & 7) << 4;
  }

 private:
  static constexpr uint32_t ROW_BYTES = 128;
  static uint32_t field(uint64_t descriptor, int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; }
  uint32_t start_, panel_, stride_;
};

template <class T, bool TRANSPOSED, int ROWS>
void read_operand(uint64_t descriptor, float (&values)[ROWS][16], const Clock& clock,
                  const std::vector<Event>& readers) {
  const Operand<TRANSPOSED> operand(descriptor);
  for (int first = 0; first < ROWS * 16; first += 8) {
    const int row = TRANSPOSED ? first % ROWS : first / 16, k = TRANSPOSED ? first / ROWS : first % 16;
    uint16_t raw[8];
    cluster().shared().read_operand(operand.address(row, k), raw, sizeof raw, clock, readers);
    for (int i = 0; i < 8; i++) {
      (TRANSPOSED ? values[row + i][k] : values[row][k + i]) = to_float(T{raw[i]});
    }
  }
}

// The sums at a place of a thread's own: taken away from it by the first product that adds to them.
inline PendingSums& take_sums(Thread& thread, float* place) {
  for (PendingSums& sums : thread.sums) {
    if (sums.place == place) return sums;
  }
  thread.sums.push_back({place, std::vector<float>(place, place + PendingSums::COUNT), 0});
  std::memset(place, 0xff, PendingSums::COUNT * sizeof(float));
  return thread.sums.back();
}

struct ProductOperands {
  float* sums;
  uint64_t a, b;
};

template <class T, bool TRANSPOSED>
void warpgroup_multiply_add(void* const (&threads)[WARPGROUP]) {
  const auto operands = [&](int index) { return static_cast<const ProductOperands*>(threads[index]); };
  for (int index = 1; index < WARPGROUP; index++) {
    if (operands(index)->a != operands(0)->a || operands(index)->b != operands(0)->b) {
      fail("wgmma: threads of a warpgroup give different descriptors");
    }
  }
  const int first = cluster().current().index / WARPGROUP * WARPGROUP;
  Clock clock;
  clock.learn(cluster().thread(first).clock);
  for (int index = 1; index < WARPGROUP; index++) clock.forget(cluster().thread(first + index).clock);
  std::vector<Event> readers;
  for (int warp = 0; warp < WARPGROUP / WARP; warp++) readers.push_back(cluster().next_product(first / WARP + warp));
  float a[64][16], b[WARPGROUP_COLUMNS][16];
  read_operand<T, TRANSPOSED>(operands(0)->a, a, clock, readers);
  read_operand<T, TRANSPOSED>(operands(0)->b, b, clock, readers);
  for (int index = 0; index < WARPGROUP; index++) {
    Thread& thread = cluster().thread(first + index);
    PendingSums& sums = take_sums(thread, operands(index)->sums);
    for (int i = 0; i < PendingSums::COUNT; i++) {
      const float* row = a[index / WARP * 16 + index % WARP / 4 + i / 2 % 2 * 8];
      const float* column = b[i / 4 * 8 + index % 4 * 2 + i % 2];
      float products = 0;
      for (int k = 0; k < 16; k++) products += row[k] * column[k];
      sums.values[i] += products;
    }
    sums.products++;
    thread.open_products.push_back({readers[index / WARP], sums.place});
  }
}

// A thread has waited for a product: it has its sums back, unless later products still add to them.
inline void finish_product(Thread& thread, const ProductShare& share) {
  const auto sums = std::find_if(thread.sums.begin(), thread.sums.end(),
                                 [&](const PendingSums& pending) { return pending.place == share.sums; });
  for (int i = 0; i < PendingSums::COUNT; i++) {
    if (bits_of(sums->place[i]) != 0xffffffffu) fail("wgmma: sums were written while products add to them");
  }
  if (--sums->products == 0) {
    std::copy(sums->values.begin(), sums->values.end(), sums->place);
    thread.sums.erase(sums);
  }
  thread.clock.learn(share.finished);
}

}  // namespace host

SIMT_DEVICE void publish_shared() { host::cluster().shared().publish(host::cluster().current().clock); }

SIMT_DEVICE void warpgroup_arrive() { host::cluster().current().has_arrived = true; }

SIMT_DEVICE uint64_t matrix_descriptor(shared_address address, int panel_bytes = 16) {
  if (address % 16) host::fail("wgmma: the address of a descriptor is misaligned");
  constexpr uint64_t ROWS = uint64_t{1024 >> 4} << 32, SWIZZLE = uint64_t{1} << 62;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 | ROWS | SWIZZLE;
}

template <class T, bool TRANSPOSED = false>
SIMT_DEVICE void warpgroup_multiply_add(WarpgroupSums& sums, uint64_t a, uint64_t b) {
  if (!host::cluster().current().has_arrived) host::fail("wgmma without warpgroup_arrive since the last wait");
  host::ProductOperands mine{sums[0], a, b};
  host::cluster().with_warpgroup(host::warpgroup_multiply_add<T, TRANSPOSED>, &mine);
}

SIMT_DEVICE void warpgroup_commit() {
  host::Thread& thread = host::cluster().current();
  thread.products.push_back(std::move(thread.open_products));
  thread.open_products.clear();
}

template <int COUNT>
SIMT_DEVICE void release_registers() {
  static_assert(IS_REGISTER_COUNT<COUNT>, "a multiple of 8 from 24 to 256");
  host::cluster().with_warpgroup([](void* const (&)[host::WARPGROUP]) {}, nullptr);
  host::cluster().release_registers(COUNT);
}
template <int COUNT>
SIMT_DEVICE void request_registers() {
  static_assert(IS_REGISTER_COUNT<COUNT>, "a multiple of 8 from 24 to 256");
  host::cluster().with_warpgroup([](void* const (&)[host::WARPGROUP]) {}, nullptr);
  host::cluster().request_registers(COUNT);
}

template <int PENDING>
SIMT_DEVICE void warpgroup_wait(WarpgroupSums&) {
  host::Thread& thread = host::cluster().current();
  while (static_cast<int>(thread.products.size()) > PENDING) {
    for (const host::ProductShare& share : thread.products.front()) host::finish_product(thread, share);
    thread.products.pop_front();
  }
  thread.has_arrived = false;
}

}  // namespace simt
