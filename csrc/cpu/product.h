// The product of two packed operands: a tile of sums that stays in registers while the sum runs.
#pragma once

#include "vector.h"

namespace fastvit::FASTVIT_ISA {

// Registers hold the sums, a row of one operand, and what multiplies it.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 14, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;

// What is multiplied. Operands lie in words of 32 bits: in a word are the VALUES that follow each other along the sum.

struct Float32 {
  using Element = float;
  static constexpr int VALUES = 1;
  static Floats multiply_add(Floats sums, float a, Floats b) { return sums + a * b; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Element = bfloat16;
  static constexpr int VALUES = 2;
  static Floats multiply_add(Floats sums, float a, Floats b) {
    const auto pair = bits_as<__m512bh>(all_words(bits_as<uint32_t>(a)));
    return bits_as<Floats>(_mm512_dpbf16_ps(bits_as<__m512>(sums), pair, bits_as<__m512bh>(b)));
  }
};
#endif

// Whether `compute` is multiplied as it is; other types are as float32.
inline bool multiplies_bfloat16(Type compute) {
#if defined(__AVX512BF16__)
  return compute == Type::BFLOAT16;
#else
  return compute == Type::FLOAT32 && false;
#endif
}

// Calls `use` with Float32{} or Bfloat16{}.
template <class Use>
inline void with_operand(Type compute, const Use& use) {
#if defined(__AVX512BF16__)
  if (compute == Type::BFLOAT16) return use(Bfloat16{});
#endif
  use(Float32{});
}

using Tile = float[TILE_ROWS][TILE_COLUMNS];

// tile[i][j] = sum over s of a[i * ROW + s * step] b[s * TILE_COLUMNS + j], all counted in words.
template <class Operand>
__attribute__((noinline)) void multiply(const float* a, int64_t row, int64_t step, const float* b, int64_t steps,
                                        Tile& tile) {
  Floats sums[TILE_ROWS][TILE_VECTORS] = {};
  for (int64_t s = 0; s < steps; s++) {
    Floats values[TILE_VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < TILE_VECTORS; j++) values[j] = load(b + s * TILE_COLUMNS + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) {
      const float factor = a[i * row + s * step];
#pragma GCC unroll 4
      for (int j = 0; j < TILE_VECTORS; j++) sums[i][j] = Operand::multiply_add(sums[i][j], factor, values[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < TILE_VECTORS; j++) store(&tile[i][j * LANES], sums[i][j]);
  }
}

}  // namespace fastvit::FASTVIT_ISA
