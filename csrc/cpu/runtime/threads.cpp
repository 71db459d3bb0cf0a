#include "../threads.h"

#include <torch/csrc/stable/ops.h>

namespace fastvit {

void run_parallel(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t end) { body(context, first, end); });
}

int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace fastvit
