// A kernel for each primitive; see primitives.h. Fragments go in and come out as registers: where each value belongs is
// stated by who compares.
#include "primitives.h"

#include <stdexcept>
#include <string>

#include "simt/launch.h"

namespace fastvit {
namespace {

using simt::shared_address;
using Four = simt::Vector<4>;

struct Primitive {
  const void* input;
  void* output;
};

SIMT_DEVICE int lane() { return simt::thread_index() % 32; }

SIMT_DEVICE const unsigned char* input_byte(const Primitive& p, int byte) {
  return static_cast<const unsigned char*>(p.input) + byte;
}

// The 16 bytes of a thread.
SIMT_DEVICE Four input_of(const Primitive& p, int thread) { return simt::load_global<4>(input_byte(p, thread * 16)); }

template <int WORDS>
SIMT_DEVICE void output_at(const Primitive& p, int byte, const uint32_t* words) {
  simt::Vector<WORDS> value;
  SIMT_UNROLL for (int i = 0; i < WORDS; i++) value.word[i] = words[i];
  simt::store_global<WORDS>(static_cast<unsigned char*>(p.output) + byte, value);
}

SIMT_DEVICE void output_sums(const Primitive& p, int place, const float (&sums)[4]) {
  uint32_t words[4];
  SIMT_UNROLL for (int i = 0; i < 4; i++) words[i] = simt::bits(sums[i]);
  output_at<4>(p, place * 16, words);
}

// -8 to 8, of byte `index` of the words.
SIMT_DEVICE float small(const uint32_t* words, int index) {
  return static_cast<float>(static_cast<int>((words[index / 4] >> (8 * (index % 4)) & 0xff) % 17) - 8);
}

template <class T>
SIMT_DEVICE uint32_t small_pair(const uint32_t* words, int index) {
  return simt::pack<T>(small(words, index), small(words, index + 1));
}

// Row r of the input's 32 goes to shared memory; lane l addresses row (5 l + 3) % 32.
template <bool TRANSPOSED>
SIMT_KERNEL(32, 1)
load_matrices(Primitive p) {
  const shared_address base = simt::shared_base();
  simt::store_shared<4>(base + lane() * 16, input_of(p, lane()));
  simt::sync_warp();
  const shared_address row = base + (5 * lane() + 3) % 32 * 16;
  uint32_t fragments[4];
  if constexpr (TRANSPOSED) {
    simt::load_matrices_transposed(fragments, row);
  } else {
    simt::load_matrices(fragments, row);
  }
  output_at<4>(p, lane() * 16, fragments);
}

// A lane's 16 bytes: 8 values of A, 4 of B, 4 sums to start from.
template <class T>
SIMT_KERNEL(32, 1)
multiply_add(Primitive p) {
  const Four in = input_of(p, lane());
  uint32_t a[4], b[2];
  float sums[4];
  SIMT_UNROLL for (int i = 0; i < 4; i++) a[i] = small_pair<T>(in.word, 2 * i);
  SIMT_UNROLL for (int i = 0; i < 2; i++) b[i] = small_pair<T>(in.word, 8 + 2 * i);
  SIMT_UNROLL for (int i = 0; i < 4; i++) sums[i] = small(in.word, 12 + i);
  simt::multiply_add<T>(sums, a, b[0], b[1]);
  output_sums(p, lane(), sums);
}

// A lane's 16 bytes: 4 values of A, 2 of B, 4 sums to start from, 2 unused; the last word is noise for the lower bits.
SIMT_KERNEL(32, 1)
multiply_add_tf32(Primitive p) {
  const Four in = input_of(p, lane());
  const auto noise = [&](int operand) { return in.word[3] >> (3 * operand) & 0x1fff; };
  uint32_t a[4], b[2];
  float sums[4];
  SIMT_UNROLL for (int i = 0; i < 4; i++) a[i] = simt::bits(small(in.word, i)) | noise(i);
  SIMT_UNROLL for (int i = 0; i < 2; i++) b[i] = simt::bits(small(in.word, 4 + i)) | noise(4 + i);
  SIMT_UNROLL for (int i = 0; i < 4; i++) sums[i] = small(in.word, 6 + i);
  simt::multiply_add_tf32(sums, a, b[0], b[1]);
  output_sums(p, lane(), sums);
}

// Infinite where the word is odd, else NaN, nearly always.
SIMT_DEVICE uint32_t not_finite(uint32_t word) {
  return (word & 1 ? 0xff800000u : 0xffffffffu) & (word | 0x7f800000u);
}

// Four float32: any, a tie, just below a tie, and infinite or NaN.
SIMT_KERNEL(32, 1)
round_to_tf32(Primitive p) {
  const Four in = input_of(p, lane());
  const uint32_t upper = 0xffffe000u, values[4] = {
      in.word[0],
      (in.word[1] & upper) | 0x1000,
      (in.word[2] & upper) | 0x0fff,
      not_finite(in.word[3]),
  };
  uint32_t rounded[4];
  SIMT_UNROLL for (int i = 0; i < 4; i++) rounded[i] = simt::round_to_tf32(values[i]);
  output_at<4>(p, lane() * 16, rounded);
}

// Each lane copies its 16 bytes in pieces and reads another lane's. Behind the 512 bytes each piece has one that is odd
// where the copy is valid.
template <int BYTES>
SIMT_KERNEL(32, 1)
copy_async(Primitive p) {
  constexpr int PIECES = 16 / BYTES;
  const shared_address base = simt::shared_base();
  SIMT_UNROLL for (int i = 0; i < PIECES; i++) {
    const int piece = lane() * PIECES + i;
    const bool is_valid = simt::load_element(input_byte(p, 512 + piece)) & 1;
    simt::copy_async<BYTES>(base + piece * BYTES, input_byte(p, piece * BYTES), is_valid);
  }
  simt::copy_commit();
  simt::copy_wait<0>();
  simt::sync_warp();
  const Four read = simt::load_shared<4>(base + (lane() + 7) % 32 * 16);
  output_at<4>(p, lane() * 16, read.word);
}

// Words 2 and 3 choose from the bytes of words 0 and 1, and of words 1 and 0.
SIMT_KERNEL(32, 1)
permute_bytes(Primitive p) {
  const Four in = input_of(p, lane());
  const uint32_t chosen[2] = {simt::permute_bytes(in.word[0], in.word[1], in.word[2]),
                              simt::permute_bytes(in.word[1], in.word[0], in.word[3])};
  output_at<2>(p, lane() * 8, chosen);
}

SIMT_KERNEL(32, 1)
shuffle(Primitive p) {
  const Four in = input_of(p, lane());
  const uint32_t received[4] = {simt::shuffle_xor(in.word[0], 1), simt::shuffle_xor(in.word[1], 6),
                                simt::shuffle_xor(in.word[2], 16), simt::shuffle_xor(in.word[3], 31)};
  output_at<4>(p, lane() * 16, received);
}

// Not finite, or behind float16's largest number, which is where its infinity begins: anywhere, or the number or a tie.
SIMT_DEVICE uint32_t extreme(uint32_t word) {
  if (word % 4 < 2) return not_finite(word);
  return (word & 0x80000000u) | 0x477fe000u | (word % 4 == 2 ? word & 0x1fff : word & 0x1000);
}

// 2^-27 to 2^20, either sign: from what float16 rounds to zero to what it rounds to infinity.
SIMT_DEVICE uint32_t near_float16(uint32_t word) {
  return (word & 0x807fffffu) | ((word >> 23 & 0xff) % 48 + 100) << 23;
}

// Four float32: any, near the range of float16, the same with up to 23 zeros at the end (ties), and extreme.
template <class T>
SIMT_KERNEL(32, 1)
narrow(Primitive p) {
  const Four in = input_of(p, lane());
  const uint32_t zeros = in.word[2] % 24;
  const float values[4] = {
      simt::from_bits(in.word[0]),
      simt::from_bits(near_float16(in.word[1])),
      simt::from_bits(near_float16(in.word[2]) >> zeros << zeros),
      simt::from_bits(extreme(in.word[3])),
  };
  const uint32_t packed[2] = {simt::pack<T>(values[0], values[1]), simt::pack<T>(values[2], values[3])};
  output_at<2>(p, lane() * 16, packed);
  T* rounded = static_cast<T*>(p.output) + lane() * 8 + 4;
  SIMT_UNROLL for (int i = 0; i < 4; i++) simt::store_element(rounded + i, simt::round_to<T>(values[i]));
}

// Eight 16-bit numbers, by both ways to float32. Which NaN a NaN becomes is not compared.
template <class T>
SIMT_KERNEL(32, 1)
widen(Primitive p) {
  const auto comparable = [](float value) { return value == value ? simt::bits(value) : 0x7fffffffu; };
  const Four in = input_of(p, lane());
  uint32_t of_pairs[8], of_elements[8];
  SIMT_UNROLL for (int i = 0; i < 8; i++) {
    of_pairs[i] = comparable(simt::half_of<T>(in.word[i / 2], i % 2));
    of_elements[i] = comparable(simt::to_float(simt::load_element(static_cast<const T*>(p.input) + lane() * 8 + i)));
  }
  SIMT_UNROLL for (int i = 0; i < 8; i += 4) {
    output_at<4>(p, lane() * 64 + i * 4, of_pairs + i);
    output_at<4>(p, lane() * 64 + 32 + i * 4, of_elements + i);
  }
}

// A product of 64 rows of A and 192 of B, 64 values of the reduction.
constexpr int WARPGROUP_ROWS = 64 + simt::WARPGROUP_COLUMNS, WARPGROUP_PRODUCTS = 64 * simt::WARPGROUP_COLUMNS;

// The values of A and B in lines of 64, a row each, or, transposed, a value of the reduction of 64 rows each; then the
// sums that each thread starts from; a byte each.
template <class T, bool TRANSPOSED>
SIMT_KERNEL(128, 1)
warpgroup_multiply_add(Primitive p) {
  constexpr int GROUPS = simt::WARPGROUP_COLUMNS / 8, PANEL = 64 * 128, STEP = TRANSPOSED ? 16 * 128 : 16 * 2;
  const shared_address a = simt::shared_base(), b = a + PANEL;
  const int thread = simt::thread_index();
  for (int piece = thread; piece < WARPGROUP_ROWS * 8; piece += 128) {
    const auto in = simt::load_global<2>(input_byte(p, piece * 8));
    Four values;
    SIMT_UNROLL for (int i = 0; i < 4; i++) values.word[i] = small_pair<T>(in.word, 2 * i);
    const int line = piece / 8, chunk = piece % 8;
    simt::store_shared<4>(a + line * 128 + ((chunk ^ line % 8) << 4), values);
  }
  simt::WarpgroupSums sums;
  SIMT_UNROLL for (int j = 0; j < GROUPS; j += 4) {
    const Four in = input_of(p, WARPGROUP_ROWS * 4 + thread * (GROUPS / 4) + j / 4);
    SIMT_UNROLL for (int i = 0; i < 16; i++) sums[j + i / 4][i % 4] = small(in.word, i);
  }
  simt::publish_shared();
  simt::sync_threads();
  simt::warpgroup_arrive();
  SIMT_UNROLL for (int step = 0; step < 4 * STEP; step += STEP) {
    simt::warpgroup_multiply_add<T, TRANSPOSED>(sums, simt::matrix_descriptor(a + step, TRANSPOSED ? PANEL : 16),
                                                simt::matrix_descriptor(b + step, TRANSPOSED ? PANEL : 16));
  }
  simt::warpgroup_commit();
  simt::warpgroup_wait<0>(sums);
  SIMT_UNROLL for (int j = 0; j < GROUPS; j++) output_sums(p, thread * GROUPS + j, sums[j]);
}

// Two blocks of a warp: each copies a half of every part of the input to both, and all of them read what the lane seven
// further would. Parts follow one another through the same memory, 1024 bytes each.
constexpr int BLOCKS = 2, PARTS = 3, PART = 1024, HALF = PART / BLOCKS;

SIMT_KERNEL(32, 1)
copy_bulk(Primitive p) {
  const shared_address base = simt::shared_base(), full = base + PART, empty = full + 8;
  const int rank = simt::cluster_rank();
  if (lane() == 0) {
    simt::mbarrier_init(full, 1);
    simt::mbarrier_init(empty, BLOCKS);
    simt::mbarrier_publish();
  }
  simt::sync_cluster();
  for (int part = 0; part < PARTS; part++) {
    if (lane() < BLOCKS) simt::mbarrier_arrive(empty, lane());
    if (lane() == 0) {
      simt::mbarrier_wait(empty, part % 2);
      simt::mbarrier_expect(full, PART);
      simt::copy_bulk(base + rank * HALF, input_byte(p, part * PART + rank * HALF), HALF, full, (1 << BLOCKS) - 1);
    }
    simt::mbarrier_wait(full, part % 2);
    SIMT_UNROLL for (int half = 0; half < BLOCKS; half++) {
      const Four read = simt::load_shared<4>(base + half * HALF + (lane() + 7) % 32 * 16);
      output_at<4>(p, (rank * PARTS + part) * PART + half * HALF + lane() * 16, read.word);
    }
    simt::sync_warp();
  }
  simt::sync_cluster();
}

// Four warpgroups: the last, which does with fewer registers, passes parts of the input to the others, which have more,
// through two stages. A thread of theirs reads what that seven further would.
constexpr int PASSED = 5, TAKERS = 384, STAGE = 128 * 16, STAGES = 2;

SIMT_DEVICE shared_address full_stage(int part) { return simt::shared_base() + STAGES * STAGE + part % STAGES * 16; }
SIMT_DEVICE shared_address empty_stage(int part) { return full_stage(part) + 8; }
SIMT_DEVICE shared_address stage_place(int part, int thread) {
  return simt::shared_base() + part % STAGES * STAGE + thread * 16;
}

SIMT_DEVICE void give_parts(const Primitive& p) {
  const int thread = simt::thread_index() - TAKERS;
  simt::release_registers<104>();
  for (int part = 0; part < PASSED; part++) {
    simt::mbarrier_wait(empty_stage(part), part / STAGES % 2 ^ 1);
    simt::store_shared<4>(stage_place(part, thread), input_of(p, part * 128 + thread));
    simt::sync_warp();
    if (lane() == 0) simt::mbarrier_arrive(full_stage(part));
  }
}

SIMT_DEVICE void take_parts(const Primitive& p) {
  const int thread = simt::thread_index();
  simt::request_registers<136>();
  for (int part = 0; part < PASSED; part++) {
    simt::mbarrier_wait(full_stage(part), part / STAGES % 2);
    const Four read = simt::load_shared<4>(stage_place(part, (thread + 7) % 128));
    output_at<4>(p, (part * TAKERS + thread) * 16, read.word);
    simt::sync_warp();
    if (lane() == 0) simt::mbarrier_arrive(empty_stage(part));
  }
}

SIMT_KERNEL(TAKERS + 128, 1)
pass_on(Primitive p) {
  if (simt::thread_index() == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      simt::mbarrier_init(full_stage(stage), 128 / 32);
      simt::mbarrier_init(empty_stage(stage), TAKERS / 32);
    }
  }
  simt::sync_threads();
  if (simt::thread_index() >= TAKERS) {
    give_parts(p);
  } else {
    take_parts(p);
  }
}

struct Entry {
  const char* name;
  void (*kernel)(Primitive);
  int threads, shared_bytes, input_bytes, output_bytes;
  bool needs_sm90a = false;
  int blocks = 1;  // a cluster of them
};

using simt::bfloat16;
using simt::half;

constexpr int SHARED = WARPGROUP_ROWS * 128;  // of a warpgroup's operands, two bytes a value
constexpr int WARPGROUP_INPUT = WARPGROUP_ROWS * 64 + WARPGROUP_PRODUCTS, WARPGROUP_OUTPUT = WARPGROUP_PRODUCTS * 4;

const Entry ENTRIES[] = {
    {"ldmatrix", load_matrices<false>, 32, 512, 512, 512},
    {"ldmatrix.trans", load_matrices<true>, 32, 512, 512, 512},
    {"mma float16", multiply_add<half>, 32, 0, 512, 512},
    {"mma bfloat16", multiply_add<bfloat16>, 32, 0, 512, 512},
    {"mma tf32", multiply_add_tf32, 32, 0, 512, 512},
    {"round to tf32", round_to_tf32, 32, 0, 512, 512},
    {"cp.async 4", copy_async<4>, 32, 512, 512 + 128, 512},
    {"cp.async 8", copy_async<8>, 32, 512, 512 + 64, 512},
    {"cp.async 16", copy_async<16>, 32, 512, 512 + 32, 512},
    {"permute bytes", permute_bytes, 32, 0, 512, 256},
    {"shuffle", shuffle, 32, 0, 512, 512},
    {"float32 to float16", narrow<half>, 32, 0, 512, 512},
    {"float32 to bfloat16", narrow<bfloat16>, 32, 0, 512, 512},
    {"float16 to float32", widen<half>, 32, 0, 512, 2048},
    {"bfloat16 to float32", widen<bfloat16>, 32, 0, 512, 2048},
    {"wgmma float16", warpgroup_multiply_add<half, false>, 128, SHARED, WARPGROUP_INPUT, WARPGROUP_OUTPUT, true},
    {"wgmma bfloat16", warpgroup_multiply_add<bfloat16, false>, 128, SHARED, WARPGROUP_INPUT, WARPGROUP_OUTPUT, true},
    {"wgmma transposed float16", warpgroup_multiply_add<half, true>, 128, SHARED, WARPGROUP_INPUT, WARPGROUP_OUTPUT,
     true},
    {"wgmma transposed bfloat16", warpgroup_multiply_add<bfloat16, true>, 128, SHARED, WARPGROUP_INPUT,
     WARPGROUP_OUTPUT, true},
    {"cp.async.bulk", copy_bulk, 32, PART + 16, PARTS * PART, BLOCKS * PARTS * PART, true, BLOCKS},
    {"setmaxnreg", pass_on, TAKERS + 128, STAGES * (STAGE + 16), PASSED * STAGE, PASSED * TAKERS * 16, true},
};

}  // namespace

int primitive_count() { return static_cast<int>(sizeof ENTRIES / sizeof ENTRIES[0]); }
const char* primitive_name(int which) { return ENTRIES[which].name; }
int primitive_input_bytes(int which) { return ENTRIES[which].input_bytes; }
int primitive_output_bytes(int which) { return ENTRIES[which].output_bytes; }

bool has_primitive(int which, const Queue& queue) {
#if defined(FASTVIT_HAS_SM90A) || !defined(__CUDACC__)
  constexpr bool HAS_SM90A = true;
#else
  constexpr bool HAS_SM90A = false;
#endif
  return !ENTRIES[which].needs_sm90a || (HAS_SM90A && queue.capability == 90);
}

void run_primitive(int which, const void* input, void* output, const Queue& queue) {
  const Entry& entry = ENTRIES[which];
  if (!has_primitive(which, queue)) throw std::invalid_argument(std::string(entry.name) + ": not on this device");
  simt::launch(queue, entry.kernel, entry.blocks, 1, entry.threads, entry.shared_bytes, Primitive{input, output},
               entry.blocks);
}

}  // namespace fastvit
