// Shared memory gives 128 bytes at a time, a word from each of its 32 banks: words of one bank wait for one another.
#pragma once

#include <algorithm>
#include <cstdint>

namespace simt::host {

constexpr int BANKS = 32;

// How often memory had to be asked again.
inline int64_t& bank_conflicts() {
  static int64_t count = 0;
  return count;
}

// `count` lanes read as many bytes each, at most 128 together. Lanes that read the same word share it.
inline void count_conflicts(const uint32_t* addresses, int count, int bytes) {
  uint32_t words[BANKS][BANKS];  // those read from each bank
  int held[BANKS] = {}, most = 1;
  for (int lane = 0; lane < count; lane++) {
    for (uint32_t word = addresses[lane] / 4; word < (addresses[lane] + bytes) / 4; word++) {
      const uint32_t bank = word % BANKS;
      uint32_t* const end = words[bank] + held[bank];
      if (std::find(words[bank], end, word) != end) continue;
      *end = word;
      most = std::max(most, ++held[bank]);
    }
  }
  bank_conflicts() += most - 1;
}

}  // namespace simt::host
