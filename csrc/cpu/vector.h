// As many float32 values as a register of the instruction set holds, and their way to memory and back. Of intrinsics
// the masked ones are taken, with all lanes: in the others' place in its headers GCC 12 sees what is not initialised.
//
// Arithmetic is that of the compilers' vector types: a * b + c, which they contract, comparisons that give masks. A
// type that a register holds whole is what they compile well, so that LANES differs: 4, 8 or 16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../views.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastvit::FASTVIT_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));  // and masks: -1 where it holds, else 0
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(LANES)));

// Elements of 16 bits, as they lie in memory.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Floats all(float value) { return value - Floats{}; }  // of -0 too
inline Words all_words(uint32_t value) { return Words{} + value; }

// a where the mask holds, else b.
inline Words select(Ints mask, Words a, Words b) {
  const Words m = bits_as<Words>(mask);
  return (a & m) | (b & ~m);
}
inline Floats select(Ints mask, Floats a, Floats b) {
  return bits_as<Floats>(select(mask, bits_as<Words>(a), bits_as<Words>(b)));
}

// The first `count` values, from 0 to LANES, and zeros behind them.
inline Floats first_of(Floats values, int64_t count) {
  if (count >= LANES) return values;
  Floats kept = {};
  for (int i = 0; i < count; i++) kept[i] = values[i];
  return kept;
}

inline Floats minimum(Floats a, Floats b) { return select(a < b, a, b); }
inline Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

// Added in halves, by way of registers: an array would keep what is summed in memory from its first addition on.
inline float sum(Floats values) {
#if defined(__AVX512F__)
  const __m256 upper = _mm512_maskz_extractf32x8_ps(0xff, bits_as<__m512>(values), 1);
  const __m256 eight = _mm512_maskz_extractf32x8_ps(0xff, bits_as<__m512>(values), 0) + upper;
#elif defined(__AVX2__)
  const __m256 eight = bits_as<__m256>(values);
#endif
#if defined(__AVX2__)
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
  const Floats four = values;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// exp(x) for x ≤ 0, within 2 ulp: 2^n · e^r with |r| ≤ ln(2)/2. Below -86, where n would leave the normal numbers, 0.
inline Floats exp_of_negative(Floats x) {
  const Floats shifted = x * 1.44269504f + 0x1.8p23f;  // whose lowest bits are n
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats value = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Moshier's expf, of Cephes
  value = value * r + 8.3334519073e-3f;
  value = value * r + 4.1665795894e-2f;
  value = value * r + 1.6666665459e-1f;
  value = value * r + 5.0000001201e-1f;
  value = value * (r * r) + r + 1.0f;
  const Floats scaled = bits_as<Floats>(bits_as<Words>(value) + (bits_as<Words>(shifted) << 23));
  return select(x < -86.0f, Floats{}, scaled);
}

// The values of both at PLACES, those of `b` counted on from LANES.
template <int32_t... PLACES>
inline Floats shuffled(Floats a, Floats b, std::integer_sequence<int32_t, PLACES...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, PLACES...);
#else
  return __builtin_shuffle(a, b, Ints{PLACES...});
#endif
}

// Of every four lanes the first half, or the second, SIZE values of `a` and of `b` in turn.
template <int SIZE, bool SECOND, int32_t... I>
inline Floats halves_of_fours(Floats a, Floats b, std::integer_sequence<int32_t, I...>) {
  constexpr auto place = [](int32_t i) {
    return i / 4 * 4 + (SECOND ? 2 : 0) + (SIZE == 2 ? i % 2 : i % 4 / 2) + i % 4 / SIZE % 2 * LANES;
  };
  return shuffled(a, b, std::integer_sequence<int32_t, place(I)...>{});
}

// Every other four lanes of `a`, and behind them of `b`.
template <bool ODD, int32_t... I>
inline Floats every_other_four(Floats a, Floats b, std::integer_sequence<int32_t, I...>) {
  constexpr auto place = [](int32_t i) {
    const int32_t fours = LANES / 4, four = i / 4 * 2;
    return (four + ODD) % fours * 4 + i % 4 + (four >= fours ? LANES : 0);
  };
  return shuffled(a, b, std::integer_sequence<int32_t, place(I)...>{});
}

// Rows become columns: those of every 4 by 4 values, and then the fours. Within four lanes, and of whole fours, a
// shuffle needs no register of places.
inline void transpose(Floats (&rows)[LANES]) {
  constexpr std::make_integer_sequence<int32_t, LANES> I{};
  constexpr int FOURS = LANES / 4;
  Floats columns[4][FOURS];
#pragma GCC unroll 4
  for (int four = 0; four < FOURS; four++) {
    const Floats *first = rows + 4 * four, *third = first + 2;
    const Floats low = halves_of_fours<1, false>(first[0], first[1], I);
    const Floats high = halves_of_fours<1, true>(first[0], first[1], I);
    const Floats low_of_third = halves_of_fours<1, false>(third[0], third[1], I);
    const Floats high_of_third = halves_of_fours<1, true>(third[0], third[1], I);
    columns[0][four] = halves_of_fours<2, false>(low, low_of_third, I);
    columns[1][four] = halves_of_fours<2, true>(low, low_of_third, I);
    columns[2][four] = halves_of_fours<2, false>(high, high_of_third, I);
    columns[3][four] = halves_of_fours<2, true>(high, high_of_third, I);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    if constexpr (FOURS == 1) {
      rows[k] = columns[k][0];
    } else {
      const Floats even = every_other_four<false>(columns[k][0], columns[k][1], I);
      const Floats odd = every_other_four<true>(columns[k][0], columns[k][1], I);
      if constexpr (FOURS == 2) {
        rows[k] = even, rows[4 + k] = odd;
      } else {
        const Floats more_even = every_other_four<false>(columns[k][2], columns[k][3], I);
        const Floats more_odd = every_other_four<true>(columns[k][2], columns[k][3], I);
        rows[k] = every_other_four<false>(even, more_even, I), rows[8 + k] = every_other_four<true>(even, more_even, I);
        rows[4 + k] = every_other_four<false>(odd, more_odd, I), rows[12 + k] = every_other_four<true>(odd, more_odd, I);
      }
    }
  }
}

// Between the bits of 16-bit elements and float32. Rounding is to nearest, ties to even, and exact.

inline Floats widen(Shorts bits, bfloat16) {
  return bits_as<Floats>(__builtin_convertvector(bits, Words) << 16);
}

inline Shorts narrow(Floats values, bfloat16) {
#if defined(__AVX512BF16__)  // takes what is below 2^-126 for zero
  return bits_as<Shorts>(_mm512_cvtneps_pbh(bits_as<__m512>(values)));
#else
  const Words bits = bits_as<Words>(values);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(select(values == values, rounded, all_words(0x7fc0)), Shorts);
#endif
}

inline Floats widen(Shorts bits, float16) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(bits)));
#elif defined(__F16C__)
  return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(bits)));
#elif defined(__aarch64__)
  return bits_as<Floats>(vcvt_f32_f16(bits_as<float16x4_t>(bits)));
#else
  const Words wide = __builtin_convertvector(bits, Words);
  const Words sign = (wide & 0x8000) << 16, magnitude = wide & 0x7fff;
  const Words infinite = bits_as<Words>(magnitude >= 0x7c00);
  const Words normal = (magnitude << 13) + (112u << 23) + (infinite & (112u << 23));
  // Below the normal ones: a multiple of 2^-24.
  const Floats small = __builtin_convertvector(bits_as<Ints>(magnitude), Floats) * 0x1p-24f;
  return bits_as<Floats>(select(magnitude < 0x400, bits_as<Words>(small), normal) | sign);
#endif
}

inline Shorts narrow(Floats values, float16) {
#if defined(__AVX512F__)
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return bits_as<Shorts>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(values), NEAREST));
#elif defined(__F16C__)
  return bits_as<Shorts>(_mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  return bits_as<Shorts>(vcvt_f16_f32(bits_as<float32x4_t>(values)));
#else
  const Words bits = bits_as<Words>(values), magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below the normal ones: the spacing of floats from 0.5 on is 2^-24, and the addition rounds to it.
  const Words small = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - bits_as<Words>(all(0.5f));
  Words half = select(magnitude < (113u << 23), small, normal);
  half = select(magnitude >= 0x477ff000, all_words(0x7c00), half);  // 65520 and on
  half = select(values == values, half, all_words(0x7e00));
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Shorts);
#endif
}

// LANES elements from memory.

inline Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

template <class T>  // float16 or bfloat16
inline Floats load(const T* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return widen(bits, T{});
}

inline Floats load(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
}

// Asks for memory that is read soon. The empty assembly is an effect: GCC leaves out calls of what has none.
inline void prefetch(const void* from, int64_t bytes) {
  constexpr int64_t LINE = 64;
  const char* const end = static_cast<const char*>(from) + bytes;
  for (const char* line = end - bytes - reinterpret_cast<uintptr_t>(from) % LINE; line < end; line += LINE) {
    __builtin_prefetch(line);
    asm volatile("");
  }
}

// A single element.
inline float load_one(const float* from) { return *from; }
template <class T>
inline float load_one(const T* from) {
  return widen(Shorts{from->bits}, T{})[0];
}

// The first `count` elements, from 0 to LANES, and zeros behind them. Calls, as they come once a row.
template <class T>
__attribute__((noinline)) Floats load_first(const T* from, int64_t count) {
  T first[LANES] = {};
  for (int64_t i = 0; i < count; i++) first[i] = from[i];
  return load(first);
}

template <class T>
inline Floats load(const T* from, int64_t count) {
  return count >= LANES ? load(from) : load_first(from, count);
}

// Rounds LANES values and stores them, or the first `count`, from 0 to LANES.

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

template <class T>  // float16 or bfloat16
inline void store(T* to, Floats values) {
  const Shorts bits = narrow(values, T{});
  std::memcpy(to, &bits, sizeof bits);
}

template <class T>
__attribute__((noinline)) void store_first(T* to, Floats values, int64_t count) {
  T first[LANES];
  store(first, values);
  for (int64_t i = 0; i < count; i++) to[i] = first[i];
}

template <class T>
inline void store(T* to, Floats values, int64_t count) {
  count >= LANES ? store(to, values) : store_first(to, values, count);
}

// As they would be read again.
template <class T>
inline Floats rounded_to(Floats values) {
  return widen(narrow(values, T{}), T{});
}
template <>
inline Floats rounded_to<float>(Floats values) {
  return values;
}

// LANES as a type, so that what is done to whole vectors is compiled apart from what is done to the tail.
struct Whole {
  constexpr operator int64_t() const { return LANES; }
};

// Calls use(first, count) for every LANES columns of 0 to width, and for what is left behind them.
template <class Use>
inline void each_vector(int64_t width, const Use& use) {
  int64_t column = 0;
  for (; column + LANES <= width; column += LANES) use(column, Whole());
  if (column < width) use(column, width - column);
}

// Calls `use` with an element of a type known at run time.
template <class Use>
inline void with_type(Type type, const Use& use) {
  if (type == Type::FLOAT32) return use(float{});
  if (type == Type::BFLOAT16) return use(bfloat16{});
  use(float16{});
}

// In place of a T*: elements of a type known at run time, for small tensors and rare combinations of types, of which
// each would be code of its own. The branches are the same each time, which costs a processor little.
struct Any {
  char* data;
  Type type;

  Any operator+(int64_t i) const { return {data + i * bytes_of(type), type}; }
};

inline Floats load(Any from, int64_t count) {
  if (from.type == Type::FLOAT32) return load(reinterpret_cast<const float*>(from.data), count);
  if (from.type == Type::BFLOAT16) return load(reinterpret_cast<const bfloat16*>(from.data), count);
  return load(reinterpret_cast<const float16*>(from.data), count);
}

// Stores as `store` does, and gives the values as they would be read again.
template <class T>
inline Floats store_rounded(T* to, Floats values, int64_t count) {
  store(to, values, count);
  return rounded_to<T>(values);
}

inline Floats store_rounded(Any to, Floats values, int64_t count) {
  if (to.type == Type::FLOAT32) return store_rounded(reinterpret_cast<float*>(to.data), values, count);
  if (to.type == Type::BFLOAT16) return store_rounded(reinterpret_cast<bfloat16*>(to.data), values, count);
  return store_rounded(reinterpret_cast<float16*>(to.data), values, count);
}

inline void store(Any to, Floats values, int64_t count) { store_rounded(to, values, count); }

// The elements of a tensor, as a T* or as Any.
template <class Pointer>
inline Pointer pointer_to(const View& view) {
  if constexpr (std::is_same_v<Pointer, Any>) {
    return {static_cast<char*>(view.data), view.type};
  } else {
    return static_cast<Pointer>(view.data);
  }
}

template <class T>
inline const T* elements(const View& view) {
  return static_cast<const T*>(view.data);
}
template <class T>
inline T* writable(const View& view) {
  return static_cast<T*>(view.data);
}

}  // namespace fastvit::FASTVIT_ISA
