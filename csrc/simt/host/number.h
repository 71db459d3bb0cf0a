// float16 and bfloat16 on the host: storage, and conversions that round to nearest, ties to even, as the GPU's do.
#pragma once

#include <cstdint>
#include <cstring>

namespace simt {

struct half {
  uint16_t raw;
};

struct bfloat16 {
  uint16_t raw;
};

namespace host {

inline uint32_t bits_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

inline float float_of(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

constexpr uint32_t SIGN = 0x80000000u, INFINITE = 0x7f800000u;

inline uint16_t half_bits(float value) {
  const uint32_t word = bits_of(value), magnitude = word & ~SIGN;
  const auto sign = static_cast<uint16_t>((word & SIGN) >> 16);
  if (magnitude > INFINITE) return 0x7fff;
  if (magnitude >= bits_of(65520.0f)) return sign | 0x7c00;  // rounds beyond the largest number, 65504
  if (magnitude < bits_of(6.103515625e-5f)) {
    // Subnormal, a multiple of 2^-24: that is what float32 numbers between 1/2 and 1 are, so an addition rounds.
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rounded = magnitude + 0x0fff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (uint32_t{127 - 15} << 23)) >> 13);
}

inline float half_value(uint16_t raw) {
  const uint32_t sign = static_cast<uint32_t>(raw & 0x8000) << 16, exponent = raw >> 10 & 31, mantissa = raw & 0x3ff;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  const uint32_t wide = exponent == 31 ? 255 : exponent + (127 - 15);
  return float_of(sign | wide << 23 | mantissa << 13);
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t word = bits_of(value);
  if ((word & ~SIGN) > INFINITE) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// To the upper 19 bits, nearest, ties away from zero. What is not finite is cut, as the instructions that nvcc makes of
// cvt.rna.tf32 do.
inline uint32_t tf32_bits(uint32_t word) {
  const bool is_finite = (word & ~SIGN) < INFINITE;
  return (is_finite ? word + 0x1000 : word) & 0xffffe000u;
}

}  // namespace host

inline float to_float(float value) { return value; }
inline float to_float(half value) { return host::half_value(value.raw); }
inline float to_float(bfloat16 value) { return host::float_of(static_cast<uint32_t>(value.raw) << 16); }

template <class T>
T round_to(float value) {
  if constexpr (std::is_same_v<T, half>) {
    return {host::half_bits(value)};
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return {host::bfloat16_bits(value)};
  } else {
    return value;
  }
}

template <class T>
uint32_t pack(float first, float second) {
  return round_to<T>(first).raw | static_cast<uint32_t>(round_to<T>(second).raw) << 16;
}

template <class T>
float half_of(uint32_t word, int which) {
  return to_float(T{static_cast<uint16_t>(word >> (16 * which))});
}

}  // namespace simt
