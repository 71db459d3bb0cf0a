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

// A patch is planes of rows of contiguous values: C planes of P_h rows of P_w values in an NCHW image, one plane of P_h
// rows of P_w·C values in an NHWC one. The reduction index is k = (plane * patch_height + row) * stretch + value.
struct PatchEmbed {
  const void* images;       // [B, ...], strides below
  const void* weight;       // W' [D, k_padded], contiguous, zero behind k_length
  const float* table;       // [R+N, D]: what every row of the sequence starts from
  const float* normaliser;  // [2, k_padded]: shift and scale of the pixel at every k; null: pixels as they are
  const int64_t* keep;      // [B, kept]: which patches; null: all
  void* tokens;             // [B, R+kept, D], contiguous
  int64_t batch_stride, plane_stride, row_stride;  // of the images, in elements
  int batch, grid_width, patches, kept, prefix_rows, width;
  int stretch, patch_height, k_length, k_padded;
  float scale;  // of the sums
};

// dW' = sum over patches of gradient x pixels, the patches divided into splits whose sums are added afterwards.
struct WeightGradient {
  PatchEmbed forward;  // images, normaliser, keep and sizes, as in the forward pass; the rest is not used
  const void* grad;    // [B, R+kept, D], contiguous, of the compute type
  float* parts;        // [splits, D, k_padded]
  int rows_per_split;  // a multiple of the rows of a step
};

}  // namespace fastvit
