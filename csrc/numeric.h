// Element types, and eight values at a time between memory and float32 registers.
#pragma once

#include "parameters.h"
#include "simt/simt.h"

namespace fastvit {

using simt::bfloat16;
using simt::half;

constexpr int EIGHT = 8;  // values a thread moves at once: 16 bytes of a 16-bit type

SIMT_BOTH bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// COUNT values from memory, eight of them by 16-byte loads.
template <int COUNT, class T>
SIMT_DEVICE void load(const T* from, float (&values)[COUNT]) {
  if constexpr (COUNT == 1) {
    values[0] = simt::to_float(simt::load_element(from));
  } else if constexpr (sizeof(T) == 2) {
    const auto words = simt::load_global<4>(from);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] = simt::half_of<T>(words.word[i / 2], i % 2);
  } else {
    SIMT_UNROLL for (int part = 0; part < 2; part++) {
      const auto words = simt::load_global<4>(from + 4 * part);
      SIMT_UNROLL for (int i = 0; i < 4; i++) values[4 * part + i] = simt::from_bits(words.word[i]);
    }
  }
}

// Rounds and stores COUNT values, eight of them by 16-byte stores.
template <int COUNT, class T>
SIMT_DEVICE void store(T* to, const float (&values)[COUNT]) {
  if constexpr (COUNT == 1) {
    simt::store_element(to, simt::round_to<T>(values[0]));
  } else if constexpr (sizeof(T) == 2) {
    simt::Vector<4> words;
    SIMT_UNROLL for (int i = 0; i < 4; i++) words.word[i] = simt::pack<T>(values[2 * i], values[2 * i + 1]);
    simt::store_global<4>(to, words);
  } else {
    SIMT_UNROLL for (int part = 0; part < 2; part++) {
      simt::Vector<4> words;
      SIMT_UNROLL for (int i = 0; i < 4; i++) words.word[i] = simt::bits(values[4 * part + i]);
      simt::store_global<4>(to + 4 * part, words);
    }
  }
}

// The same to elements of a type known at run time.
template <int COUNT>
SIMT_DEVICE void store(Type type, void* to, int64_t offset, const float (&values)[COUNT]) {
  if (type == Type::FLOAT32) {
    store(static_cast<float*>(to) + offset, values);
  } else if (type == Type::FLOAT16) {
    store(static_cast<half*>(to) + offset, values);
  } else {
    store(static_cast<bfloat16*>(to) + offset, values);
  }
}

// Calls `use` with a pointer to elements of a type known at run time: for small tensors, whose types would multiply the
// kernels. Around a loop rather than in it, so that the loop's loads can overlap.
template <class Use>
SIMT_DEVICE auto with_elements(Type type, const void* elements, const Use& use) {
  if (type == Type::FLOAT32) return use(static_cast<const float*>(elements));
  if (type == Type::FLOAT16) return use(static_cast<const half*>(elements));
  return use(static_cast<const bfloat16*>(elements));
}

template <int COUNT>
SIMT_DEVICE void load(Type type, const void* from, int64_t offset, float (&values)[COUNT]) {
  with_elements(type, from, [&](auto elements) { load<COUNT>(elements + offset, values); });
}

SIMT_DEVICE float load_one(Type type, const void* from, int64_t offset) {
  float value[1];
  load(type, from, offset, value);
  return value[0];
}

}  // namespace fastvit
