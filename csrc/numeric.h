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

// Eight values as they lie in memory: a word for each float32, half a word for each of 16 bits. They are converted when
// all loads are under way, as a conversion waits for its own.
using Words = uint32_t[EIGHT];
using Values = float[EIGHT];

// The first `count` of eight elements, zeros behind them. WIDE: it is none or all, which lie at a multiple of 16 bytes.
template <bool WIDE>
SIMT_DEVICE void load_words(const Elements& from, int64_t offset, int count, Words& words) {
  const bool is_float = from.type == Type::FLOAT32;
  SIMT_UNROLL for (uint32_t& word : words) word = 0;
  if (count <= 0) return;
  const char* first = static_cast<const char*>(from.data) + offset * (is_float ? 4 : 2);
  if constexpr (WIDE) {
    const auto low = simt::load_global<4>(first);
    SIMT_UNROLL for (int i = 0; i < 4; i++) words[i] = low.word[i];
    if (!is_float) return;
    const auto high = simt::load_global<4>(first + 16);
    SIMT_UNROLL for (int i = 0; i < 4; i++) words[4 + i] = high.word[i];
  } else if (is_float) {
    const auto* elements = reinterpret_cast<const uint32_t*>(first);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) words[i] = i < count ? simt::load_element(elements + i) : 0;
  } else {
    const auto* elements = reinterpret_cast<const uint16_t*>(first);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      if (i < count) words[i / 2] |= static_cast<uint32_t>(simt::load_element(elements + i)) << (16 * (i % 2));
    }
  }
}

template <bool WIDE>
SIMT_DEVICE void store_words(const Elements& to, int64_t offset, int count, const Words& words) {
  const bool is_float = to.type == Type::FLOAT32;
  if (count <= 0) return;
  char* first = static_cast<char*>(to.data) + offset * (is_float ? 4 : 2);
  if constexpr (WIDE) {
    simt::store_global<4>(first, simt::Vector<4>{{words[0], words[1], words[2], words[3]}});
    if (is_float) simt::store_global<4>(first + 16, simt::Vector<4>{{words[4], words[5], words[6], words[7]}});
  } else if (is_float) {
    auto* elements = reinterpret_cast<uint32_t*>(first);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      if (i < count) simt::store_element(elements + i, words[i]);
    }
  } else {
    auto* elements = reinterpret_cast<uint16_t*>(first);
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) {
      if (i < count) simt::store_element(elements + i, static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    }
  }
}

SIMT_DEVICE void from_words(Type type, const Words& words, Values& values) {
  if (type == Type::FLOAT32) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] = simt::from_bits(words[i]);
  } else if (type == Type::FLOAT16) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] = simt::half_of<half>(words[i / 2], i % 2);
  } else {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) values[i] = simt::half_of<bfloat16>(words[i / 2], i % 2);
  }
}

// Of rounded values.
SIMT_DEVICE void to_words(Type type, const Values& values, Words& words) {
  if (type == Type::FLOAT32) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i++) words[i] = simt::bits(values[i]);
  } else if (type == Type::FLOAT16) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i += 2) words[i / 2] = simt::pack<half>(values[i], values[i + 1]);
  } else {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i += 2) words[i / 2] = simt::pack<bfloat16>(values[i], values[i + 1]);
  }
}

SIMT_DEVICE float sum_of_warp(float value) {
  SIMT_UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += simt::from_bits(simt::shuffle_xor(simt::bits(value), lanes));
  }
  return value;
}

SIMT_DEVICE float load_one(Type type, const void* from, int64_t offset) {
  float value[1];
  load(type, from, offset, value);
  return value[0];
}

}  // namespace fastvit
