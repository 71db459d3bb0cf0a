// Division by a number that a launch knows and a kernel divides by again and again: a multiplication and a shift.
#pragma once

#include <cstdint>

#include "simt/simt.h"

namespace fastvit {

// Of dividends from 0 to 2^31 - 1 (Granlund and Montgomery, 1994, theorem 4.2 with N = 31).
struct Divider {
  uint32_t divisor = 1, multiplier = 0x80000000u;
  int shift = 31;

  Divider() = default;
  explicit Divider(int number) : divisor(number > 1 ? static_cast<uint32_t>(number) : 1) {  // by 0: as by 1
    int bits = 0;
    while ((uint64_t{1} << bits) < divisor) bits++;
    shift = 31 + bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  SIMT_BOTH int quotient(int dividend) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(dividend)) * multiplier >> shift);
  }
  SIMT_BOTH int remainder(int dividend, int quotient) const {
    return dividend - quotient * static_cast<int>(divisor);
  }
};

}  // namespace fastvit
