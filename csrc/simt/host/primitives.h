// The primitives of device.h, emulated: the same names, the same meaning, every access checked.
#pragma once

#include <cstring>
#include <utility>

#include "banks.h"
#include "cluster.h"
#include "number.h"

#define SIMT_KERNEL(threads, blocks) inline void
#define SIMT_DEVICE inline
#define SIMT_BOTH inline
#define SIMT_UNROLL

namespace simt {

SIMT_DEVICE int thread_index() { return host::cluster().thread_index(); }
SIMT_DEVICE int block_x() { return host::cluster().x(); }
SIMT_DEVICE int grid_x() { return host::cluster().grid_x(); }
SIMT_DEVICE int block_y() { return host::cluster().y(); }
SIMT_DEVICE shared_address shared_base() { return 0; }

SIMT_DEVICE void sync_threads() { host::cluster().sync_threads(); }

SIMT_DEVICE void sync_warp() {
  host::cluster().with_warp(
      [](void* const(&)[host::WARP]) {
        host::cluster().synchronise(host::cluster().current().warp() * host::WARP, host::WARP);
      },
      nullptr);
}

SIMT_DEVICE uint32_t shuffle_xor(uint32_t value, int lanes) {
  struct Operands {
    uint32_t value, result;
    int lanes;
  } mine{value, 0, lanes};
  host::cluster().with_warp(
      [](void* const(&all)[host::WARP]) {
        for (int lane = 0; lane < host::WARP; lane++) {
          auto* to = static_cast<Operands*>(all[lane]);
          to->result = static_cast<const Operands*>(all[lane ^ to->lanes])->value;
        }
      },
      &mine);
  return mine.result;
}

SIMT_DEVICE uint32_t bits(float value) { return host::bits_of(value); }
SIMT_DEVICE float from_bits(uint32_t word) { return host::float_of(word); }

SIMT_DEVICE uint32_t round_to_tf32(uint32_t word) { return host::tf32_bits(word); }

SIMT_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int byte = 0; byte < 4; byte++) {
    const uint32_t chosen = selector >> (4 * byte) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * chosen) & 0xff) << (8 * byte);
  }
  return result;
}

// Global memory

template <int WORDS>
SIMT_DEVICE Vector<WORDS> load_global(const void* address) {
  host::global_memory().check_read(address, 4 * WORDS);
  Vector<WORDS> value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <int WORDS>
SIMT_DEVICE void store_global(void* address, Vector<WORDS> value) {
  host::global_memory().check_write(address, 4 * WORDS);
  std::memcpy(address, &value, sizeof value);
}

template <class T>
SIMT_DEVICE T load_element(const T* address) {
  host::global_memory().check_read(address, sizeof(T));
  return *address;
}

template <class T>
SIMT_DEVICE void store_element(T* address, T value) {
  host::global_memory().check_write(address, sizeof(T));
  *address = value;
}

// Shared memory

template <int WORDS>
SIMT_DEVICE Vector<WORDS> load_shared(shared_address address) {
  Vector<WORDS> value;
  host::Thread& thread = host::cluster().current();
  host::cluster().shared().read(address, &value, sizeof value, thread.clock);
  thread.loads.push_back({address, sizeof value});
  return value;
}

template <int WORDS>
SIMT_DEVICE void store_shared(shared_address address, Vector<WORDS> value) {
  host::cluster().shared().write(address, &value, sizeof value, host::cluster().current().clock);
}

// Asynchronous copies: the data of each arrives at once or only at the wait that covers it, by the seed.

template <int BYTES>
SIMT_DEVICE void copy_async(shared_address target, const void* source, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  host::Cluster& cluster = host::cluster();
  if (valid) {
    host::global_memory().check_read(source, BYTES);
  } else if (reinterpret_cast<uintptr_t>(source) % BYTES) {
    host::fail("misaligned source of a copy of zeros");
  }
  cluster.shared().start_copy(target, BYTES, cluster.current().clock);
  host::Copy copy{target, valid ? source : nullptr, BYTES, cluster.draw(2) == 0};
  if (copy.arrived) cluster.shared().arrive(copy.target, copy.source, copy.bytes);
  cluster.current().open_copies.push_back(copy);
}

SIMT_DEVICE void copy_commit() {
  host::Thread& thread = host::cluster().current();
  thread.copies.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

template <int PENDING>
SIMT_DEVICE void copy_wait() {
  host::Cluster& cluster = host::cluster();
  host::Thread& thread = cluster.current();
  while (static_cast<int>(thread.copies.size()) > PENDING) {
    for (const host::Copy& copy : thread.copies.front()) {
      if (!copy.arrived) cluster.shared().arrive(copy.target, copy.source, copy.bytes);
      cluster.shared().finish_copy(copy.target, copy.bytes, thread.clock.now());
    }
    thread.copies.pop_front();
  }
}

// Tensor cores

namespace host {

struct MatrixRow {
  shared_address row;
  uint32_t* out;
};

template <bool TRANSPOSED>
void load_matrices(void* const (&lanes)[WARP]) {
  const int warp = cluster().current().warp();
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t value[8][8];
    shared_address addresses[8];
    for (int row = 0; row < 8; row++) {
      const int lane = matrix * 8 + row;
      addresses[row] = static_cast<const MatrixRow*>(lanes[lane])->row;
      cluster().shared().read(addresses[row], value[row], 16, cluster().lane_of(warp, lane).clock);
    }
    count_conflicts(addresses, 8, 16);
    for (int lane = 0; lane < WARP; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = TRANSPOSED ? value[column][row] : value[row][column];
      const uint16_t high = TRANSPOSED ? value[column + 1][row] : value[row][column + 1];
      static_cast<const MatrixRow*>(lanes[lane])->out[matrix] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct Fragments {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// Adds the products of rows of A and columns of B to the sums of each lane. With g = lane / 4 and t = 2 (lane % 4), sum
// i is that of row g + 8 (i / 2) and column t + i % 2.
template <int K>
void add_products(void* const (&lanes)[WARP], const float (&a)[16][K], const float (&b)[8][K]) {
  for (int lane = 0; lane < WARP; lane++) {
    float* sum = static_cast<const Fragments*>(lanes[lane])->sum;
    for (int i = 0; i < 4; i++) {
      const float* row = a[lane / 4 + i / 2 * 8];
      const float* column = b[lane % 4 * 2 + i % 2];
      float products = 0;
      for (int k = 0; k < K; k++) products += row[k] * column[k];
      sum[i] += products;
    }
  }
}

// mma.m16n8k16 (PTX ISA): register i of A holds row g + 8 (i % 2), columns t + 8 (i / 2) and the next; register i of B
// rows t + 8 i and the next, column g.
template <class T>
void multiply_add(void* const (&lanes)[WARP]) {
  float a[16][16], b[8][16];  // B by columns
  for (int lane = 0; lane < WARP; lane++) {
    const auto* fragments = static_cast<const Fragments*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int which = 0; which < 2; which++) {
      for (int i = 0; i < 4; i++) {
        a[group + i % 2 * 8][pair + i / 2 * 8 + which] = half_of<T>(fragments->a[i], which);
      }
      for (int i = 0; i < 2; i++) b[group][pair + i * 8 + which] = half_of<T>(fragments->b[i], which);
    }
  }
  add_products(lanes, a, b);
}

// mma.m16n8k8 of TF32: register i of A holds row g + 8 (i % 2), column lane % 4 + 4 (i / 2); register i of B row
// lane % 4 + 4 i, column g. The lower 13 bits of a register are ignored.
inline void multiply_add_tf32(void* const (&lanes)[WARP]) {
  const auto upper = [](uint32_t word) { return float_of(word & 0xffffe000u); };
  float a[16][8], b[8][8];  // B by columns
  for (int lane = 0; lane < WARP; lane++) {
    const auto* fragments = static_cast<const Fragments*>(lanes[lane]);
    const int group = lane / 4, k = lane % 4;
    for (int i = 0; i < 4; i++) a[group + i % 2 * 8][k + i / 2 * 4] = upper(fragments->a[i]);
    for (int i = 0; i < 2; i++) b[group][k + i * 4] = upper(fragments->b[i]);
  }
  add_products(lanes, a, b);
}

}  // namespace host

SIMT_DEVICE void load_matrices(uint32_t (&out)[4], shared_address row) {
  host::MatrixRow mine{row, out};
  host::cluster().with_warp(host::load_matrices<false>, &mine);
}

SIMT_DEVICE void load_matrices_transposed(uint32_t (&out)[4], shared_address row) {
  host::MatrixRow mine{row, out};
  host::cluster().with_warp(host::load_matrices<true>, &mine);
}

template <class T>
SIMT_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::Fragments mine{sum, a, {b0, b1}};
  host::cluster().with_warp(host::multiply_add<T>, &mine);
}

SIMT_DEVICE void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::Fragments mine{sum, a, {b0, b1}};
  host::cluster().with_warp(host::multiply_add_tf32, &mine);
}

}  // namespace simt
