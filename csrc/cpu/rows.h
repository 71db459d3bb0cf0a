// What ops on rows [rows, width] share: vectors in float32, code for the types that models have, sums over rows.
#pragma once

#include "../ops.h"
#include "threads.h"
#include "vector.h"

namespace fastvit::FASTVIT_ISA {

inline int64_t padded(int64_t width) { return up(width, LANES) * LANES; }

// A vector in float32, with zeros behind it to whole registers; one that is not there is `missing` everywhere.
inline const float* vector_of(const View& view, int64_t width, float missing, const Queue& queue) {
  float* values = queue.scratch<float>("vector", padded(width));
  const Any from = pointer_to<Any>(view);
  each_vector(width, [&](int64_t i, auto n) {
    store(values + i, first_of(view ? load(from + i, n) : all(missing), n));
  });
  return values;
}

// The type that all of the tensors have that are there; INT64 if they differ.
template <class... Views>
Type common(const Views&... views) {
  Type type = Type::INT64;
  bool is_first = true, is_common = true;
  const auto look = [&](const View& view) {
    if (!view) return;
    is_common = is_common && (is_first || view.type == type);
    type = view.type, is_first = false;
  };
  (look(views), ...);
  return is_common ? type : Type::INT64;
}

// Calls `use` with pointers of two types: code of their own have one for both, and float32 beside a half precision, as
// of a float32 stream through a model under autocast.
template <class Use>
void with_types(Type first, Type second, const Use& use) {
  if (first == Type::FLOAT32) {
    if (second == Type::FLOAT32) return use((float*){}, (float*){});
    if (second == Type::BFLOAT16) return use((float*){}, (bfloat16*){});
    if (second == Type::FLOAT16) return use((float*){}, (float16*){});
  }
  if (first == Type::BFLOAT16 && second == first) return use((bfloat16*){}, (bfloat16*){});
  if (first == Type::FLOAT16 && second == first) return use((float16*){}, (float16*){});
  use(Any{}, Any{});
}

// Sums over rows, [columns] float32: a chunk of rows each by itself, and then the chunks' in order.
class RowSums {
 public:
  RowSums(int64_t rows, int64_t columns, const Queue& queue)
      : chunks_(rows, LEAST_ROWS, MOST_CHUNKS), columns_(columns),
        partials_(queue.scratch<float>("partial sums", chunks_.count * columns)) {}

  // Calls body(first row, end, sums) for every chunk; the sums, zeros at first, have `columns` places. `values`: how
  // many are read or written of a row.
  template <class Body>
  void run(int64_t values, const Body& body) const {
    parallel(chunks_.count, chunks_.size * values, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) {
        float* sums = partials_ + chunk * columns_;
        each_vector(columns_, [&](int64_t i, auto n) { store(sums + i, Floats{}, n); });
        body(chunks_.first(chunk), chunks_.end(chunk), sums);
      }
    });
  }

  // Of `width` columns from `first` on, what all chunks have.
  void add_up(int64_t first, int64_t width, float* to) const {
    each_vector(width, [&](int64_t i, auto n) {
      Floats total = {};
      const float* partial = partials_ + first + i;
      for (int64_t chunk = 0; chunk < chunks_.count; chunk++, partial += columns_) total += load(partial, n);
      store(to + i, total, n);
    });
  }

 private:
  static constexpr int64_t LEAST_ROWS = 32, MOST_CHUNKS = 64;
  Chunks chunks_;
  int64_t columns_;
  float* partials_;
};

}  // namespace fastvit::FASTVIT_ISA
