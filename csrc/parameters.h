// What each kernel is given. Pointers to elements of a type known at run time are void.
#pragma once

#include <cstdint>

namespace fastvit {

// Element types; the numbers are part of the interface to Python.
enum class Type : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, UINT8 = 3 };

struct AddPosition {
  const void* tokens;     // [B, N, D], any strides
  const void* positions;  // [N, D] or [R+N, D], contiguous
  const void* prefix;     // [R, D], contiguous; null where R = 0
  void* out;              // [B, R+N, D], contiguous
  int64_t batch_stride, token_stride, width_stride;  // of the tokens, in elements
  int batch, patches, prefix_rows, width, position_rows;
  Type positions_type, prefix_type;
};

struct SumRows {
  const void* matrix;  // [rows, columns], contiguous
  float* sums;         // [splits, columns]: each split sums rows_per_split rows
  int64_t columns;
  int rows, rows_per_split;
};

}  // namespace fastvit
