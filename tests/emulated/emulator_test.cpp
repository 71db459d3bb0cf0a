// Small kernels, right ones and wrong ones, run by the emulation. Prints a line for each: name, tab, fault or nothing.
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

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

// The same with TF32: the lower 13 bits of a register mean nothing.
void product_tf32() {
  const int lane = thread_index() % 32, group = lane / 4, k = lane % 4;
  uint32_t a[4], b[2], noise = 0x9e37u * (lane + 1);
  const auto operand = [&](float number) { return bits(number) | ((noise = noise * 5 + 1) & 0x1fff); };
  for (int i = 0; i < 4; i++) a[i] = operand(value(group + i % 2 * 8, k + i / 2 * 4));
  for (int i = 0; i < 2; i++) b[i] = operand(value(group, k + i * 4 + 3));
  float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  multiply_add_tf32(sum, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) {
    const int row = group + i / 2 * 8, column = k * 2 + i % 2;
    float expected = 1.0f;
    for (int depth = 0; depth < 8; depth++) expected += value(row, depth) * value(column, depth + 3);
    expect(sum[i] == expected, "wrong product");
  }
}

float scratch[THREADS];

void write_scratch() { store_element(scratch + thread_index(), 1.0f + thread_index()); }
void write_output() { store_element(output + thread_index(), 1.0f + thread_index()); }
void read_scratch() { expect(load_element(scratch + thread_index() / 2) == 1.0f + thread_index() / 2, "wrong value"); }
void copy_scratch() { copy_async<4>(4 * thread_index(), scratch + thread_index(), true); }
void read_output() { expect(load_element(output + thread_index() / 2) == 1.0f + thread_index() / 2, "wrong value"); }
void write_and_read_scratch() {
  write_scratch();
  sync_threads();
  read_scratch();
}
void write_some_scratch() {
  if (thread_index() != 9) write_scratch();
}

// Loads of WORDS words, STRIDE words from lane to lane.
template <int WORDS, int STRIDE>
void strided_loads() {
  for (int index = thread_index(); index < SHARED_BYTES / 4; index += THREADS) store_shared<1>(4 * index, word(index));
  sync_threads();
  load_shared<WORDS>(4 * STRIDE * thread_index());
}

// Lanes that a branch has parted are no access of a warp; behind the next barrier they are again.
template <bool REUNITED>
void parted_loads() {
  strided_loads<1, 1>();
  sync_warp();
  if (thread_index() % 2) shared_word(thread_index() % 32 * 8);
  if (REUNITED) sync_warp();
  shared_word(thread_index() % 32 * 8);
}

void different_loads() {
  strided_loads<1, 1>();
  sync_warp();
  if (thread_index() % 2) {
    load_shared<2>(32 * thread_index());
  } else {
    load_shared<1>(32 * thread_index());
  }
}

// Rows of matrices, all of them in the same banks.
void matrices_in_the_same_banks() {
  strided_loads<1, 1>();
  uint32_t fragments[4];
  load_matrices(fragments, thread_index() % 16 * 128);
}

// A warpgroup multiplies [64, 64] by the transpose of [192, 64], twice into the same sums.
constexpr int DEPTH = 64, FIRST_ROWS = 64, SECOND_ROWS = WARPGROUP_COLUMNS;
constexpr int WARPGROUP_BYTES = (FIRST_ROWS + SECOND_ROWS) * DEPTH * 2;
constexpr shared_address FIRST = 0, SECOND = FIRST_ROWS * DEPTH * 2;
uint16_t operands[(FIRST_ROWS + SECOND_ROWS) * DEPTH];
int waited;  // how many threads have

enum Wrong {
  NOTHING, NOT_PUBLISHED, ONE_NOT_PUBLISHED, PUBLISHED_LATE, PUBLISHED_BEFORE_THE_COPY, NO_BARRIER, NO_ARRIVE,
  ARRIVES_ONCE, NO_COMMIT, NO_WAIT, WAITS_FOR_TOO_LITTLE, WRITES_SUMS, OVERWRITES, COPIES_OVER, OVERWRITES_AFTER_WAIT,
  LAST_OVERWRITES, DIFFERENT_DESCRIPTORS, MISALIGNED, SECOND_ROW, LEAVES_ROW, OUT_OF_RANGE, LANES_APART, WARPS_APART,
  THREE_WARPS,
};

template <Wrong WRONG, bool COPIES>
void fill_operands() {
  const int me = thread_index();
  for (int piece = me; piece < (FIRST_ROWS + SECOND_ROWS) * DEPTH / 8; piece += 128) {
    const int row = piece / 8, chunk = piece % 8;
    const shared_address target = row * DEPTH * 2 + ((chunk ^ row % 8) << 4);
    if (COPIES) {
      copy_async<16>(target, operands + piece * 8, true);
    } else {
      store_shared<4>(target, load_global<4>(operands + piece * 8));
    }
  }
  copy_commit();
  if (WRONG == PUBLISHED_BEFORE_THE_COPY) publish_shared();
  copy_wait<0>();
  const bool is_late = WRONG == PUBLISHED_LATE || WRONG == PUBLISHED_BEFORE_THE_COPY;
  if (WRONG != NOT_PUBLISHED && !is_late && (WRONG != ONE_NOT_PUBLISHED || me != 77)) publish_shared();
  if (WRONG != NO_BARRIER) sync_threads();
  if (WRONG == PUBLISHED_LATE) publish_shared();
}

template <Wrong WRONG>
uint64_t first_descriptor(int k) {
  const int me = thread_index();
  if (WRONG == DIFFERENT_DESCRIPTORS && me == 99) k ^= 16;
  if (WRONG == MISALIGNED) return matrix_descriptor(FIRST + k * 2 + 8);
  if (WRONG == SECOND_ROW) return matrix_descriptor(FIRST + k * 2 + 128);
  if (WRONG == LEAVES_ROW) return matrix_descriptor(FIRST + k * 2 + 16);
  if (WRONG == OUT_OF_RANGE) return matrix_descriptor(FIRST + k * 2 + 4 * 8192);
  return matrix_descriptor(FIRST + k * 2);
}

template <Wrong WRONG, class T>
void warpgroup_multiply(WarpgroupSums& sums, int k) {
  using Other = std::conditional_t<std::is_same_v<T, half>, bfloat16, half>;
  const uint64_t a = first_descriptor<WRONG>(k), b = matrix_descriptor(SECOND + k * 2);
  if (WRONG == LANES_APART && thread_index() % 2) return sync_warp();
  if (WRONG == WARPS_APART && thread_index() / 32 == 2) return warpgroup_multiply_add<Other>(sums, a, b);
  warpgroup_multiply_add<T>(sums, a, b);
}

void expect_products(const WarpgroupSums& sums, int times) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  for (int j = 0; j < WARPGROUP_COLUMNS / 8; j++) {
    for (int i = 0; i < 4; i++) {
      const int row = warp * 16 + lane / 4 + i / 2 * 8, column = j * 8 + lane % 4 * 2 + i % 2;
      float expected = 1.0f;
      for (int k = 0; k < DEPTH; k++) expected += times * value(row, k) * value(FIRST_ROWS + column, k);
      expect(sums[j][i] == expected, "wrong product");
    }
  }
}

template <Wrong WRONG, class T, bool COPIES = false>
void warpgroup_product() {
  WarpgroupSums sums;
  for (auto& four : sums) {
    for (float& sum : four) sum = 1.0f;
  }
  for (int round = 0; round < 2; round++) {
    fill_operands<WRONG, COPIES>();
    if (WRONG == THREE_WARPS && thread_index() / 32 == 3) return;
    if (WRONG != NO_ARRIVE && (WRONG != ARRIVES_ONCE || round == 0)) warpgroup_arrive();
    for (int k = 0; k < DEPTH; k += 16) warpgroup_multiply<WRONG, T>(sums, k);
    if (WRONG == NO_COMMIT && round == 1) return;
    warpgroup_commit();
    if (WRONG == WRITES_SUMS) sums[3][1] = 2.0f;
    if (WRONG == OVERWRITES && thread_index() == 5) store_shared<1>(SECOND, word(0));
    if (WRONG == COPIES_OVER && thread_index() == 5) copy_async<16>(FIRST, operands, true);
    if (WRONG == NO_WAIT && round == 1) return;
    if (WRONG == WAITS_FOR_TOO_LITTLE) {
      warpgroup_wait<1>(sums);
    } else {
      warpgroup_wait<0>(sums);
    }
    expect_products(sums, round + 1);
    if (WRONG == LAST_OVERWRITES && ++waited == 128) store_shared<1>(SECOND, word(0));
    if (WRONG != OVERWRITES_AFTER_WAIT) sync_threads();
  }
}

// Two groups in flight: the first has finished once one is left.
void two_groups_of_products() {
  WarpgroupSums first = {}, second = {};
  fill_operands<NOTHING, false>();
  warpgroup_arrive();
  for (int k = 0; k < DEPTH; k += 16) warpgroup_multiply<NOTHING, bfloat16>(first, k);
  warpgroup_commit();
  for (int k = 0; k < DEPTH; k += 16) warpgroup_multiply<NOTHING, bfloat16>(second, k);
  warpgroup_commit();
  warpgroup_wait<1>(first);
  expect(second[0][0] != second[0][0], "sums of a product in flight are there");
  for (auto& four : first) {
    for (float& sum : four) sum += 1.0f;
  }
  expect_products(first, 1);
  warpgroup_wait<0>(second);
  for (auto& four : second) {
    for (float& sum : four) sum += 1.0f;
  }
  expect_products(second, 1);
}

// The same matrices transposed: a line holds a value of the reduction of 64 rows, and 64 lines are a panel.
template <int START, int PANEL>
void transposed_product() {
  WarpgroupSums sums;
  for (auto& four : sums) {
    for (float& sum : four) sum = 1.0f;
  }
  fill_operands<NOTHING, false>();
  warpgroup_arrive();
  for (int k = 0; k < DEPTH; k += 16) {
    const uint64_t a = matrix_descriptor(FIRST + START + k * 128, PANEL);
    warpgroup_multiply_add<bfloat16, true>(sums, a, matrix_descriptor(SECOND + k * 128, PANEL));
  }
  warpgroup_commit();
  warpgroup_wait<0>(sums);
  expect_products(sums, 1);
}

void half_a_warpgroup() {
  warpgroup_arrive();
  WarpgroupSums sums = {};
  warpgroup_multiply<NOTHING, bfloat16>(sums, 0);
}

// Two blocks: each copies a half of `source` to both, adds what has come to what came before, and goes on.
enum WrongCopy {
  RIGHT, NO_FULL_WAIT, ONE_FULL_WAIT, NO_EMPTY_WAIT, NO_REMOTE_ARRIVAL, OWN_ARRIVALS_COUNT, TOO_MANY_ARRIVALS,
  WRONG_FULL_PARITY, WRONG_EMPTY_PARITY, TOO_FEW_BYTES, TOO_MANY_BYTES, OWN_BLOCK_ALONE, NO_BLOCK, BLOCK_OUTSIDE,
  NO_FENCE, FENCE_BEFORE_INIT, NO_BARRIER_BEHIND_INIT, BLOCK_BARRIER_BEHIND_INIT, NOT_INITIALISED, NO_BARRIER_AT_END,
  READ_BEHIND_ARRIVAL, MISALIGNED_TARGET, MISALIGNED_SOURCE, MISALIGNED_SIZE, TARGET_NOT_PUBLISHED, MBARRIER_READ,
  MBARRIER_WRITTEN, MISALIGNED_MBARRIER, COPY_OUTSIDE, ENDS_BEFORE_THE_BARRIER, UNEXPECTED_BYTES,
};
constexpr int PART = 16 * THREADS, FULL = PART, EMPTY = PART + 8;

template <WrongCopy WRONG>
void start_mbarriers() {
  if (WRONG == NOT_INITIALISED || thread_index()) return;
  if (WRONG == FENCE_BEFORE_INIT) mbarrier_publish();
  mbarrier_init(WRONG == MISALIGNED_MBARRIER ? FULL + 4 : FULL, 1);
  mbarrier_init(EMPTY, WRONG == OWN_ARRIVALS_COUNT ? 1 : 2);
  if (WRONG != NO_FENCE && WRONG != FENCE_BEFORE_INIT) mbarrier_publish();
}

template <WrongCopy WRONG>
void copy_half(int round) {
  constexpr int BYTES = WRONG == TOO_FEW_BYTES ? PART / 2 : WRONG == TOO_MANY_BYTES ? 2 * PART : PART;
  constexpr int RANKS = WRONG == NO_BLOCK ? 0 : WRONG == BLOCK_OUTSIDE ? 7 : 3;
  const int half = PART / 2, start = cluster_rank() * half;
  const auto* from = reinterpret_cast<const unsigned char*>(source);
  const int target = start + (WRONG == MISALIGNED_TARGET ? 8 : WRONG == COPY_OUTSIDE ? 2 * PART : 0);
  if (WRONG != NO_EMPTY_WAIT) mbarrier_wait(EMPTY, (round & 1) ^ (WRONG == WRONG_EMPTY_PARITY));
  if (WRONG != UNEXPECTED_BYTES || round) mbarrier_expect(FULL, BYTES);
  if (WRONG == TOO_MANY_ARRIVALS) mbarrier_expect(FULL, 0);
  copy_bulk(target, from + start + (WRONG == MISALIGNED_SOURCE ? 8 : 0), WRONG == MISALIGNED_SIZE ? half - 8 : half,
            FULL, WRONG == OWN_BLOCK_ALONE ? 1 << cluster_rank() : RANKS);
}

template <WrongCopy WRONG>
void bulk_copies() {
  const int me = thread_index();
  if (WRONG == TARGET_NOT_PUBLISHED) store_shared<4>(16 * me, {});
  start_mbarriers<WRONG>();
  if (WRONG == BLOCK_BARRIER_BEHIND_INIT) {
    sync_threads();
  } else if (WRONG != NO_BARRIER_BEHIND_INIT) {
    sync_cluster();
  }
  for (int round = 0; round < 4; round++) {
    const bool is_own = WRONG == NO_REMOTE_ARRIVAL || WRONG == OWN_ARRIVALS_COUNT;
    if (is_own ? me == cluster_rank() : me < 2) {
      mbarrier_arrive(EMPTY, me);
    }
    if (me == 0) copy_half<WRONG>(round);
    if (WRONG != NO_FULL_WAIT && (WRONG != ONE_FULL_WAIT || me == 7)) {
      mbarrier_wait(FULL, (round & 1) ^ (WRONG == WRONG_FULL_PARITY));
    }
    const int other = (me + 5) % THREADS;
    if (WRONG != READ_BEHIND_ARRIVAL) {
      expect(from_bits(load_shared<4>(16 * other).word[2]) == source[4 * other + 2], "wrong data");
      sync_threads();
    } else {
      sync_threads();
      expect(from_bits(load_shared<4>(16 * other).word[2]) == source[4 * other + 2], "wrong data");
    }
    if (WRONG == MBARRIER_READ) shared_word(FULL / 4);
    if (WRONG == MBARRIER_WRITTEN && me == 0) store_shared<1>(EMPTY, word(0));
    if (WRONG == ENDS_BEFORE_THE_BARRIER && round == 3 && me == 9) return;
  }
  if (WRONG != NO_BARRIER_AT_END) sync_cluster();
}

// An arrival at the other block that nobody waits for: it may come when that block has ended.
template <bool BARRIER>
void last_arrival() {
  start_mbarriers<RIGHT>();
  sync_cluster();
  if (thread_index() == 5) mbarrier_arrive(EMPTY, 1 - cluster_rank());
  if (BARRIER) sync_cluster();
}

// Four warpgroups, of which the last passes words through one place to the others, which have some of its registers.
enum WrongRole {
  NO_WRONG, NOTHING_RELEASED, TOO_MANY_REQUESTED, THREE_WARPS_REQUEST, ANOTHER_COUNT, RELEASED_TO_MORE,
  REQUESTED_TO_FEWER, ARRIVAL_TOO_FEW, ARRIVAL_TOO_MANY, NO_WAIT_FOR_FULL, NO_WAIT_FOR_EMPTY, OTHER_FULL, OTHER_EMPTY,
  NO_WARP_BARRIER,
};
constexpr int ROLE_THREADS = 512, TAKERS = 384;
constexpr int ROLE_FULL = 128 * 4, ROLE_EMPTY = ROLE_FULL + 8, ROLE_BYTES = ROLE_EMPTY + 8;

template <WrongRole WRONG>
void give() {
  if (WRONG == RELEASED_TO_MORE) release_registers<136>();
  if (WRONG != NOTHING_RELEASED) release_registers<104>();
  const int me = thread_index() - TAKERS;
  for (int round = 0; round < 4; round++) {
    if (WRONG != NO_WAIT_FOR_EMPTY) mbarrier_wait(ROLE_EMPTY, (round & 1) ^ (WRONG != OTHER_EMPTY));
    store_shared<1>(4 * me, word(me + round));
    if (WRONG != NO_WARP_BARRIER) sync_warp();
    if (me % 32 == 0) mbarrier_arrive(ROLE_FULL);
  }
}

template <WrongRole WRONG>
void take() {
  const int me = thread_index();
  if (WRONG == REQUESTED_TO_FEWER) request_registers<24>();
  if (WRONG == ANOTHER_COUNT && me / 32 % 4 == 1) return request_registers<128>();
  if (WRONG != THREE_WARPS_REQUEST || me / 32 % 4) request_registers<WRONG == TOO_MANY_REQUESTED ? 144 : 136>();
  for (int round = 0; round < 4; round++) {
    if (WRONG != NO_WAIT_FOR_FULL) mbarrier_wait(ROLE_FULL, (round & 1) ^ (WRONG == OTHER_FULL));
    const int other = (me + 5) % 128;
    expect(shared_word(other) == static_cast<uint32_t>(other + round), "wrong word");
    sync_warp();
    if (me % 32 == 0) mbarrier_arrive(ROLE_EMPTY);
  }
}

template <WrongRole WRONG>
void roles() {
  if (thread_index() == 0) {
    mbarrier_init(ROLE_FULL, 128 / 32);
    mbarrier_init(ROLE_EMPTY, TAKERS / 32 + (WRONG == ARRIVAL_TOO_FEW) - (WRONG == ARRIVAL_TOO_MANY));
  }
  sync_threads();
  if (thread_index() >= TAKERS) {
    give<WRONG>();
  } else {
    take<WRONG>();
  }
}

struct Body {
  void (*run)();
};

void one_block(Body body) {
  if (block_x() == 0) body.run();
}
void all_blocks(Body body) { body.run(); }

struct Case {
  const char* name;
  std::vector<void (*)()> launches;
  int threads = THREADS;
  int shared_bytes = SHARED_BYTES;
  bool is_complete = false;  // all memory must have been written at the end
  int64_t bank_conflicts = -1;
  bool is_cluster = false;  // both blocks run it, together
};

void run_once(const Case& test, uint64_t seed) {
  host::GlobalMemory& memory = host::global_memory();
  memory.clear();
  memory.add_input("source", source, sizeof source);
  memory.add_input("operands", operands, sizeof operands);
  memory.add_output("output", output, 4 * THREADS);
  memory.add_scratch("scratch", scratch, sizeof scratch);
  host::bank_conflicts() = 0;
  waited = 0;
  Queue queue;
  queue.seed = seed;
  for (void (*body)() : test.launches) {
    launch(queue, test.is_cluster ? all_blocks : one_block, 2, 1, test.threads, test.shared_bytes, Body{body},
           test.is_cluster ? 2 : 1);
  }
  if (test.is_complete) memory.check_all_written();
  if (test.bank_conflicts >= 0 && host::bank_conflicts() != test.bank_conflicts) {
    host::fail(std::to_string(host::bank_conflicts()) + " bank conflicts");
  }
}

void run(const Case& test) {
  std::string fault;
  for (uint64_t seed = 0; seed < 8 && fault.empty(); seed++) {
    try {
      run_once(test, seed);
    } catch (const host::Fault& caught) {
      fault = caught.what();
    }
  }
  std::printf("%s\t%s\n", test.name, fault.c_str());
}

void run(const char* name, void (*body)()) { run(Case{name, {body}}); }

void run_banks(const char* name, int64_t conflicts, void (*body)()) {
  run(Case{name, {body}, THREADS, SHARED_BYTES, false, conflicts});
}

void run_warpgroup(const char* name, void (*body)()) { run(Case{name, {body}, 128, WARPGROUP_BYTES}); }

void run_roles(const char* name, void (*body)()) { run(Case{name, {body}, ROLE_THREADS, ROLE_BYTES}); }

void run_cluster(const char* name, void (*body)()) { run({name, {body}, THREADS, SHARED_BYTES, false, -1, true}); }

template <class T, bool TRANSPOSED = false>
void fill(uint16_t* to) {
  for (int row = 0; row < FIRST_ROWS + SECOND_ROWS; row++) {
    for (int k = 0; k < DEPTH; k++) {
      const int place = TRANSPOSED ? (row / 64 * DEPTH + k) * 64 + row % 64 : row * DEPTH + k;
      to[place] = round_to<T>(value(row, k)).raw;
    }
  }
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
  run({"incomplete", {incomplete}, THREADS, SHARED_BYTES, true});
  run("product float16", product<half, false>);
  run("product bfloat16", product<bfloat16, false>);
  run("product transposed", product<bfloat16, true>);
  run("product tf32", product_tf32);
  run({"two launches", {write_scratch, read_scratch}});
  run({"complete", {write_scratch, write_output, read_output}, THREADS, SHARED_BYTES, true});
  run({"scratch incomplete", {write_output, write_some_scratch}, THREADS, SHARED_BYTES, true});
  run("scratch never written", read_scratch);
  run({"scratch partly written", {write_some_scratch, read_scratch}});
  run("scratch of the same launch", write_and_read_scratch);
  run("copy of scratch never written", copy_scratch);
  run({"scratch written by two launches", {write_scratch, write_scratch}});
  run_banks("banks of words", 0, strided_loads<1, 1>);
  run_banks("banks of one word", 0, strided_loads<1, 0>);
  run_banks("banks of every second word", 2, strided_loads<1, 2>);
  run_banks("banks of pairs", 0, strided_loads<2, 2>);
  run_banks("banks of every second pair", 4, strided_loads<2, 4>);
  run_banks("banks of fours", 0, strided_loads<4, 4>);
  run_banks("banks of every second four", 8, strided_loads<4, 8>);
  run_banks("banks of parted lanes", 0, parted_loads<false>);
  run_banks("banks of reunited lanes", 14, parted_loads<true>);
  run_banks("banks of different loads", 0, different_loads);
  run_banks("banks of matrices", 56, matrices_in_the_same_banks);
  fill<half>(operands);
  run_warpgroup("wgmma float16", warpgroup_product<NOTHING, half>);
  run_warpgroup("wgmma warps apart", warpgroup_product<WARPS_APART, half>);
  fill<bfloat16>(operands);
  run_warpgroup("wgmma bfloat16", warpgroup_product<NOTHING, bfloat16>);
  run_warpgroup("wgmma of copies", warpgroup_product<NOTHING, bfloat16, true>);
  run_warpgroup("wgmma in two groups", two_groups_of_products);
  run_warpgroup("wgmma not published", warpgroup_product<NOT_PUBLISHED, bfloat16>);
  run_warpgroup("wgmma copies not published", warpgroup_product<NOT_PUBLISHED, bfloat16, true>);
  run_warpgroup("wgmma one thread not published", warpgroup_product<ONE_NOT_PUBLISHED, bfloat16>);
  run_warpgroup("wgmma published late", warpgroup_product<PUBLISHED_LATE, bfloat16>);
  run_warpgroup("wgmma published before the copy", warpgroup_product<PUBLISHED_BEFORE_THE_COPY, bfloat16, true>);
  run_warpgroup("wgmma without barrier", warpgroup_product<NO_BARRIER, bfloat16>);
  run_warpgroup("wgmma without arrive", warpgroup_product<NO_ARRIVE, bfloat16>);
  run_warpgroup("wgmma arrives once", warpgroup_product<ARRIVES_ONCE, bfloat16>);
  run_warpgroup("wgmma without commit", warpgroup_product<NO_COMMIT, bfloat16>);
  run_warpgroup("wgmma without wait", warpgroup_product<NO_WAIT, bfloat16>);
  run_warpgroup("wgmma waits for too little", warpgroup_product<WAITS_FOR_TOO_LITTLE, bfloat16>);
  run_warpgroup("wgmma sums written", warpgroup_product<WRITES_SUMS, bfloat16>);
  run_warpgroup("wgmma operand overwritten", warpgroup_product<OVERWRITES, bfloat16>);
  run_warpgroup("wgmma operand copied over", warpgroup_product<COPIES_OVER, bfloat16>);
  run_warpgroup("wgmma operand overwritten after wait", warpgroup_product<OVERWRITES_AFTER_WAIT, bfloat16>);
  run_warpgroup("wgmma operand overwritten by the last", warpgroup_product<LAST_OVERWRITES, bfloat16>);
  run_warpgroup("wgmma different descriptors", warpgroup_product<DIFFERENT_DESCRIPTORS, bfloat16>);
  run_warpgroup("wgmma misaligned", warpgroup_product<MISALIGNED, bfloat16>);
  run_warpgroup("wgmma second row", warpgroup_product<SECOND_ROW, bfloat16>);
  run_warpgroup("wgmma leaves row", warpgroup_product<LEAVES_ROW, bfloat16>);
  run_warpgroup("wgmma out of range", warpgroup_product<OUT_OF_RANGE, bfloat16>);
  run_warpgroup("wgmma lanes apart", warpgroup_product<LANES_APART, bfloat16>);
  run_warpgroup("wgmma three warps", warpgroup_product<THREE_WARPS, bfloat16>);
  run("wgmma half a warpgroup", half_a_warpgroup);
  fill<bfloat16, true>(operands);
  run_warpgroup("wgmma transposed", transposed_product<0, 64 * 128>);
  run_warpgroup("wgmma transposed leaves row", transposed_product<16, 64 * 128>);
  run_warpgroup("wgmma transposed in another panel", transposed_product<0, 32 * 128>);
  run_warpgroup("wgmma transposed out of range", transposed_product<0, 160 * 128>);
  run_cluster("bulk copies", bulk_copies<RIGHT>);
  run_cluster("bulk copies not waited for", bulk_copies<NO_FULL_WAIT>);
  run_cluster("bulk copies waited for by one thread", bulk_copies<ONE_FULL_WAIT>);
  run_cluster("bulk copies over what is read", bulk_copies<NO_EMPTY_WAIT>);
  run_cluster("bulk copies without the other's arrival", bulk_copies<NO_REMOTE_ARRIVAL>);
  run_cluster("bulk copies behind own arrivals alone", bulk_copies<OWN_ARRIVALS_COUNT>);
  run_cluster("mbarrier arrivals too many", bulk_copies<TOO_MANY_ARRIVALS>);
  run_cluster("mbarrier full of the other parity", bulk_copies<WRONG_FULL_PARITY>);
  run_cluster("mbarrier empty of the other parity", bulk_copies<WRONG_EMPTY_PARITY>);
  run_cluster("bulk copies of more than expected", bulk_copies<TOO_FEW_BYTES>);
  run_cluster("bulk copies of less than expected", bulk_copies<TOO_MANY_BYTES>);
  run_cluster("bulk copies to the own block alone", bulk_copies<OWN_BLOCK_ALONE>);
  run_cluster("bulk copies to no block", bulk_copies<NO_BLOCK>);
  run_cluster("bulk copies outside the cluster", bulk_copies<BLOCK_OUTSIDE>);
  run_cluster("mbarrier without fence", bulk_copies<NO_FENCE>);
  run_cluster("mbarrier fenced before", bulk_copies<FENCE_BEFORE_INIT>);
  run_cluster("mbarrier without barrier", bulk_copies<NO_BARRIER_BEHIND_INIT>);
  run_cluster("mbarrier with the block's barrier", bulk_copies<BLOCK_BARRIER_BEHIND_INIT>);
  run_cluster("mbarrier not initialised", bulk_copies<NOT_INITIALISED>);
  run_cluster("mbarrier read", bulk_copies<MBARRIER_READ>);
  run_cluster("mbarrier written", bulk_copies<MBARRIER_WRITTEN>);
  run_cluster("mbarrier misaligned", bulk_copies<MISALIGNED_MBARRIER>);
  run_cluster("bulk copies sent before the end", bulk_copies<NO_BARRIER_AT_END>);
  run_cluster("bulk copies read behind the arrival", bulk_copies<READ_BEHIND_ARRIVAL>);
  run_cluster("bulk copies to a misaligned target", bulk_copies<MISALIGNED_TARGET>);
  run_cluster("bulk copies of a misaligned source", bulk_copies<MISALIGNED_SOURCE>);
  run_cluster("bulk copies of a misaligned size", bulk_copies<MISALIGNED_SIZE>);
  run_cluster("bulk copies out of range", bulk_copies<COPY_OUTSIDE>);
  run_cluster("bulk copies over unpublished writes", bulk_copies<TARGET_NOT_PUBLISHED>);
  run_cluster("bulk copies without expectation", bulk_copies<UNEXPECTED_BYTES>);
  run_cluster("cluster barrier for some", bulk_copies<ENDS_BEFORE_THE_BARRIER>);
  run_cluster("last arrival", last_arrival<true>);
  run_cluster("last arrival without barrier", last_arrival<false>);
  run_roles("roles", roles<NO_WRONG>);
  run_roles("registers that nobody releases", roles<NOTHING_RELEASED>);
  run_roles("more registers than are released", roles<TOO_MANY_REQUESTED>);
  run_roles("registers for three warps", roles<THREE_WARPS_REQUEST>);
  run_roles("registers of different counts", roles<ANOTHER_COUNT>);
  run_roles("registers released to more", roles<RELEASED_TO_MORE>);
  run_roles("registers requested to fewer", roles<REQUESTED_TO_FEWER>);
  run_roles("roles of an arrival too few", roles<ARRIVAL_TOO_FEW>);
  run_roles("roles of an arrival too many", roles<ARRIVAL_TOO_MANY>);
  run_roles("roles without a wait for full", roles<NO_WAIT_FOR_FULL>);
  run_roles("roles without a wait for empty", roles<NO_WAIT_FOR_EMPTY>);
  run_roles("roles, full of the other parity", roles<OTHER_FULL>);
  run_roles("roles, empty of the other parity", roles<OTHER_EMPTY>);
  run_roles("roles without the warp's barrier", roles<NO_WARP_BARRIER>);
  // Conversions: a checksum of all 16-bit numbers there and back, for the test to compare with PyTorch's.
  for (uint32_t raw = 0; raw < 0x10000; raw += 0x10) {
    const half h{static_cast<uint16_t>(raw)};
    const bfloat16 b{static_cast<uint16_t>(raw)};
    std::printf("float16 %u\t%08x\n", raw, bits(to_float(h)));
    std::printf("bfloat16 %u\t%08x\n", raw, bits(to_float(b)));
  }
  for (uint32_t raw = 0; raw < 0x7f800000u; raw += 0x00010fb1u) {
    const float wide = from_bits(raw);
    std::printf("round %u\t%04x %04x\n", raw, round_to<half>(wide).raw, round_to<bfloat16>(wide).raw);
  }
  return 0;
}
