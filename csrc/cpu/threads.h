// Work split over the threads of PyTorch's own pool.
#pragma once

#include <cstdint>

namespace fastvit {

// Calls body(context, first, end) for parts of 0 to count that together are all of it, in as many threads as
// torch.set_num_threads allows; in one where count is at most `grain`, or in what is parallel already.
void run_parallel(int64_t count, int64_t grain, void (*body)(const void* context, int64_t first, int64_t end),
                  const void* context);

// As many as torch.set_num_threads allows. No result may depend on it.
int64_t threads();

#if defined(FASTVIT_ISA)
namespace FASTVIT_ISA {

inline int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step; }  // parts of `step`, rounded up
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Values that are worth a thread: as many as PyTorch's own ops give one.
constexpr int64_t VALUES_PER_THREAD = 32768;

// Calls body(first, end). `values`: how many are read or written for one of count.
template <class Body>
void parallel(int64_t count, int64_t values, const Body& body) {
  const int64_t grain = VALUES_PER_THREAD / (values > 0 ? values : 1);
  run_parallel(
      count, grain > 0 ? grain : 1,
      [](const void* context, int64_t first, int64_t end) { (*static_cast<const Body*>(context))(first, end); }, &body);
}

// Chunks of rows for sums over them. They depend on the number of rows alone: each chunk is summed by itself, and the
// chunks' sums are added in order, so that the same rows have the same sums with any number of threads.
struct Chunks {
  int64_t rows, size, count;

  // At most `most` of them, none of less than `smallest` rows but the last.
  Chunks(int64_t rows, int64_t smallest, int64_t most) : rows(rows) {
    size = up(rows, most);
    size = size > smallest ? size : smallest;
    count = up(rows, size);
  }
  int64_t first(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return chunk + 1 < count ? (chunk + 1) * size : rows; }
};

}  // namespace FASTVIT_ISA
#endif

}  // namespace fastvit
