// What is done with rows by parts: eight columns of a row a thread, and sums over the rows that a block takes, which
// sum_partials (row_sums.h) adds up.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "numeric.h"
#include "parameters.h"
#include "row_sums.h"

namespace fastvit {

constexpr int PART_THREADS = 256;  // the most of a block that works on several rows, or on a part of one
constexpr int PART_WARPS = PART_THREADS / 32;
constexpr int PARTIAL_BYTES = 4 * EIGHT * PART_THREADS;  // of shared memory, for store_partial
constexpr int MULTIPROCESSORS = 132;  // of an H200; a constant, so that the same sums have the same bits on every GPU

// A thread's eight columns of a row. `count`: how many of them there are, none of a row that is not there.
struct Part {
  int row, column, count;
  int64_t place;

  SIMT_DEVICE Part(int row, int rows, int column, int width, int64_t row_stride)
      : row(row), column(column), count(row < rows ? width - column : 0), place(row * row_stride + column) {}
  SIMT_DEVICE Part(int row, int rows, int column, int width) : Part(row, rows, column, width, width) {}
};

template <bool WIDE>
SIMT_DEVICE void load_part(const Elements& rows, const Part& part, Words& words) {
  load_words<WIDE>(rows, part.place, rows.data ? part.count : 0, words);
}

template <bool WIDE>
SIMT_DEVICE void load_vector(const Elements& vector, int column, int width, float missing, Values& values) {
  Words words;
  load_words<WIDE>(vector, column, vector.data ? width - column : 0, words);
  from_words(vector.type, words, values);
  if (vector.data) return;
  SIMT_UNROLL for (float& value : values) value = missing;
}

// Adds up what the groups of a block have, each as many threads as lanes, in order, and stores `count` sums at `to`.
template <bool WIDE>
SIMT_DEVICE void store_partial(int lanes, int groups, int count, Values& sums, float* to) {
  const int thread = simt::thread_index();
  // Threads side by side, so that no two of those that read together share a bank.
  const auto place = [](int thread, int i) { return simt::shared_base() + 16 * (i / 4 * PART_THREADS + thread); };
  Words words;
  to_words(Type::FLOAT32, sums, words);
  simt::sync_threads();  // what lay there has been read
  SIMT_UNROLL for (int i = 0; i < EIGHT; i += 4) {
    simt::store_shared<4>(place(thread, i), {{words[i], words[i + 1], words[i + 2], words[i + 3]}});
  }
  simt::sync_threads();
  if (thread >= lanes) return;
  for (int other = thread + lanes; other < lanes * groups; other += lanes) {
    SIMT_UNROLL for (int i = 0; i < EIGHT; i += 4) {
      const auto four = simt::load_shared<4>(place(other, i));
      SIMT_UNROLL for (int j = 0; j < 4; j++) sums[i + j] += simt::from_bits(four.word[j]);
    }
  }
  to_words(Type::FLOAT32, sums, words);
  store_words<WIDE>({to, Type::FLOAT32}, 0, count, words);
}

inline Elements elements_of(const View& view) { return {view.data, view.type}; }

// Whether rows of this width, and vectors as long, can be moved 16 bytes at a time.
inline bool is_wide(int width, std::initializer_list<Elements> all) {
  const auto fits = [](const Elements& elements) { return is_aligned(elements.data); };
  return width % EIGHT == 0 && std::all_of(all.begin(), all.end(), fits);
}

}  // namespace fastvit
