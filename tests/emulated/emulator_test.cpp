// Small kernels, right ones and wrong ones, run by the emulation. Prints a line for each: name, tab, fault ("" if none).
#include <cstdio>
#include <functional>
#include <string>

#include "simt/launch.h"

using namespace simt;

namespace {

constexpr int THREADS = 64;
constexpr int SHARED_BYTES = 16 * THREADS + 1024;

Vector<1> word(uint32_t value) { return {{value}}; }
uint32_t shared_word(int index) { return load_shared<1>(4 * index).word[0]; }

void expect(bool condition, const char* what) {
  if (!condition) host::fail(what);
}

// Every thread writes a word and reads its neighbour's.
template <bool BARRIER>
void neighbours() {
  const int me = thread_index(), other = (me + 1) % THREADS;
  store_shared<1>(4 * me, word(me));
  if (BARRIER) sync_threads();
  expect(shared_word(other) == static_cast<uint32_t>(other), "wrong neighbour");
}

// The same inside a warp, where a warp's barrier is enough; across warps it is not.
template <int DISTANCE>
void neighbours_of_a_warp() {
  const int me = thread_index(), other = me ^ DISTANCE;
  store_shared<1>(4 * me, word(me));
  sync_warp();
  expect(shared_word(other) == static_cast<uint32_t>(other), "wrong neighbour");
}

// A buffer that is read, then used again.
template <bool BARRIER>
void reuse() {
  const int me = thread_index();
  store_shared<1>(4 * me, word(me));
  sync_threads();
  shared_word((me + 32) % THREADS);
  if (BARRIER) sync_threads();
  store_shared<1>(4 * me, word(me + 1));
}

float source[4 * THREADS];

// Each thread copies 16 bytes; after wait and barrier all may read all.
template <bool WAIT, bool BARRIER, bool COMMIT>
void copies() {
  const int me = thread_index(), other = (me + 5) % THREADS;
  copy_async<16>(16 * me, source + 4 * me, me != 3);
  if (COMMIT) copy_commit();
  if (WAIT) copy_wait<0>();
  if (BARRIER) sync_threads();
  const float expected = other == 3 ? 0.0f : source[4 * other + 2];
  expect(from_bits(load_shared<4>(16 * other).word[2]) == expected, "wrong data");
}

// Two groups in flight; waiting for all but one covers the first only.
template <int READ>
void two_groups() {
  const int me = thread_index();
  copy_async<4>(4 * me, source + me, true);
  copy_commit();
  copy_async<4>(4 * (THREADS + me), source + THREADS + me, true);
  copy_commit();
  copy_wait<1>();
  expect(from_bits(shared_word(READ * THREADS + me)) == source[READ * THREADS + me], "wrong data");
  copy_wait<0>();
}

void unfinished_copy() {
  copy_async<4>(4 * thread_index(), source, true);
  copy_commit();
}

void shuffled() {
  uint32_t sum = thread_index() % 32;
  for (int lanes = 16; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
  expect(sum == 31 * 32 / 2, "wrong sum");
}

void half_a_warp() {
  if (thread_index() % 2) sync_warp();
}

void different_operations() {
  if (thread_index() % 2) {
    sync_warp();
  } else {
    shuffle_xor(0, 1);
  }
}

void barrier_for_some() {
  if (thread_index() < 32) sync_threads();
}

float output[THREADS + 1];

void written_twice() { store_element(output + thread_index() / 2, 1.0f); }
void written_outside() { store_element(output + thread_index() + 2, 1.0f); }
void input_written() { store_element(source + thread_index(), 1.0f); }
void misaligned() { load_global<4>(source + 1); }
void shared_outside() { store_shared<1>(SHARED_BYTES, word(0)); }
void never_written() { shared_word(0); }
void incomplete() {
  if (thread_index() != 7) store_element(output + thread_index(), 1.0f);
}

float value(int row, int column) { return static_cast<float>((row * 7 + column * 13) % 11) - 5.0f; }

// One warp multiplies [16, 16] by the transpose of [8, 16] through ldmatrix and mma, B also from its transpose.
template <class T, bool TRANSPOSED>
void product() {
  const int lane = thread_index() % 32, base = thread_index() / 32 * 1024;
  const int b_rows = TRANSPOSED ? 16 : 8, b_columns = TRANSPOSED ? 8 : 16;
  for (int pair = lane; pair < 16 * 8; pair += 32) {
    const int row = pair / 8, column = pair % 8 * 2;
    store_shared<1>(base + row * 32 + column * 2, word(pack<T>(value(row, column), value(row, column + 1))));
  }
  for (int pair = lane; pair < b_rows * b_columns / 2; pair += 32) {
    const int row = pair * 2 / b_columns, column = pair * 2 % b_columns;
    const float first = TRANSPOSED ? value(column, row + 3) : value(row, column + 3);
    const float second = TRANSPOSED ? value(column + 1, row + 3) : value(row, column + 4);
    store_shared<1>(base + 512 + (row * b_columns + column) * 2, word(pack<T>(first, second)));
  }
  sync_warp();
  uint32_t a[4], b[4];
  load_matrices(a, base + (lane % 16) * 32 + lane / 16 * 16);
  // Only two of the four matrices are B; the other lanes repeat their addresses.
  if (TRANSPOSED) {
    load_matrices_transposed(b, base + 512 + lane % 16 * 16);
  } else {
    load_matrices(b, base + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  }
  float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  multiply_add<T>(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float expected = 1.0f;
    for (int k = 0; k < 16; k++) expected += value(row, k) * value(column, k + 3);
    expect(sum[i] == expected, "wrong product");
  }
}

void run(const char* name, const std::function<void()>& body) {
  host::GlobalMemory& memory = host::global_memory();
  std::string fault;
  for (uint64_t seed = 0; seed < 8 && fault.empty(); seed++) {
    memory.clear();
    memory.add_input("source", source, sizeof source);
    memory.add_output("output", output, 4 * THREADS);
    try {
      host::Block block;
      block.run({2, 1}, THREADS, SHARED_BYTES, seed, [&] { if (block_x() == 0) body(); });
      if (std::string(name) == "incomplete") memory.check_all_written();
    } catch (const host::Fault& caught) {
      fault = caught.what();
    }
  }
  std::printf("%s\t%s\n", name, fault.c_str());
}

}  // namespace

int main() {
  for (int i = 0; i < 4 * THREADS; i++) source[i] = 1.0f + i;
  run("neighbours", neighbours<true>);
  run("neighbours without barrier", neighbours<false>);
  run("neighbours of a warp", neighbours_of_a_warp<1>);
  run("neighbours of another warp", neighbours_of_a_warp<32>);
  run("reuse", reuse<true>);
  run("reuse without barrier", reuse<false>);
  run("copies", copies<true, true, true>);
  run("copies without wait", copies<false, true, true>);
  run("copies without barrier", copies<true, false, true>);
  run("copies without commit", copies<true, true, false>);
  run("first group", two_groups<0>);
  run("second group", two_groups<1>);
  run("unfinished copy", unfinished_copy);
  run("shuffled", shuffled);
  run("half a warp", half_a_warp);
  run("different operations", different_operations);
  run("barrier for some", barrier_for_some);
  run("written twice", written_twice);
  run("written outside", written_outside);
  run("input written", input_written);
  run("misaligned", misaligned);
  run("shared outside", shared_outside);
  run("never written", never_written);
  run("incomplete", incomplete);
  run("product float16", product<half, false>);
  run("product bfloat16", product<bfloat16, false>);
  run("product transposed", product<bfloat16, true>);
  // Conversions: a checksum of all 16-bit numbers there and back, for the test to compare with PyTorch's.
  for (uint32_t raw = 0; raw < 0x10000; raw += 0x10) {
    const half h{static_cast<uint16_t>(raw)};
    const bfloat16 b{static_cast<uint16_t>(raw)};
    std::printf("float16 %u\t%08x\n", raw, bits(to_float(h)));
    std::printf("bfloat16 %u\t%08x\n", raw, bits(to_float(b)));
  }
  for (uint32_t raw = 0; raw < 0x7f800000u; raw += 0x00010fb1u) {
    std::printf("round %u\t%04x %04x\n", raw, round_to<half>(from_bits(raw)).raw, round_to<bfloat16>(from_bits(raw)).raw);
  }
  return 0;
}
