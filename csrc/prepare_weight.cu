// The launches around the products.
#include "prepare_weight.h"

#include "dispatch.h"

namespace fastvit {
namespace {

// For the weight's gradient, which needs nothing else of it.
SIMT_KERNEL(WEIGHT_THREADS, 2)
write_normaliser(PrepareWeight p) {
  fill_normaliser(p, simt::thread_index(), WEIGHT_THREADS);
}

}  // namespace

void prepare_weight(Type compute, const PrepareWeight& p, const simt::Queue& queue) {
  const int blocks = simt::blocks_for(p.weight_rows, WEIGHT_ROWS), shared_bytes = 4 * WEIGHT_ROWS;
  with_type(compute, [&](auto c) {
    simt::launch(queue, prepare_weight<decltype(c)>, blocks, 1, WEIGHT_THREADS, shared_bytes, p);
  });
}

void prepare_normaliser(const PrepareWeight& p, const simt::Queue& queue) {
  simt::launch(queue, write_normaliser, 1, 1, WEIGHT_THREADS, 0, p);
}

void transpose_weight(Type compute, const TransposeWeight& p, const simt::Queue& queue) {
  const int x = simt::blocks_for(p.k_length, TRANSPOSED), y = simt::blocks_for(p.width_padded, TRANSPOSED);
  const int shared_bytes = 4 * TRANSPOSED * (TRANSPOSED + 1);
  with_type(compute, [&](auto c) {
    simt::launch(queue, transpose_weight<decltype(c)>, x, y, WEIGHT_THREADS, shared_bytes, p);
  });
}

void finish_weight_gradient(const FinishWeightGradient& p, const simt::Queue& queue) {
  const int blocks = simt::blocks_for(static_cast<int64_t>(p.width) * p.k_length, WEIGHT_THREADS);
  with_type(p.weight_type, [&](auto w) {
    simt::launch(queue, finish_weight_gradient<decltype(w)>, blocks, 1, WEIGHT_THREADS, 0, p);
  });
}

}  // namespace fastvit
