// What each kernel is given. Pointers to elements of a type known at run time are void; all else is described in
// elements, not bytes. Rows and columns of matrices that have no strides here lie side by side.
#pragma once

#include <cstdint>

#include "divider.h"
#include "views.h"

namespace fastvit {

struct AddPosition {
  const void* tokens;     // [B, N, D], any strides
  const void* positions;  // [N, D] or [R+N, D]
  const void* prefix;     // [R, D]; null where R = 0
  void* out;              // [B, R+N, D]
  int64_t batch_stride, token_stride, width_stride;  // of the tokens
  int batch, patches, prefix_rows, width, position_rows;
  Type positions_type, prefix_type;
};

// Elements of a type known at run time; null: there are none.
struct Elements {
  void* data;
  Type type;
};

// sum = residual + keep · scale · (branch + bias), rounded, and the norm of it. Of a block's rows `groups` are worked on
// at once, each by `lanes` threads.
struct AddNorm {
  Elements residual, branch;                // [rows, D]; without a branch the sum is the residual, and is not written
  Elements bias, scale, weight, norm_bias;  // [D]
  const float* keep;                        // [B]; null: none
  Elements sum, normed;                     // [rows, D]
  float* statistics;                        // [2, rows]: mean (of an RMS norm zero) and 1/deviation of every row
  int rows, tokens, width;                  // B * T, T, D
  int lanes, groups;
  float eps, centre;                        // centre: 1; 0 for an RMS norm
};

struct AddNormBackward {
  Elements sum, d_normed, d_sum, branch;  // [rows, D]; the branch is read with a scale alone
  Elements bias, scale, weight;           // [D]
  const float* keep;                      // [B]; null: none
  const float* statistics;                // [2, rows]
  Elements d_residual, d_branch;          // [rows, D]; no d_branch where it is d_residual itself
  float* partials;                        // [blocks, vectors, D]: of weight, norm_bias, bias, scale, those there are
  int rows, rows_per_block, tokens, width, vectors;
  int lanes, groups;
  float centre;
  bool has_norm_bias;
};

// out = act(x + bias), perhaps times (up + up_bias). Where x and up are the halves of one matrix, a row is twice as far
// from the next, and so it is in their gradients.
struct BiasAct {
  Elements x, up;          // [rows, F], rows row_stride apart; no up: nothing is multiplied
  Elements bias, up_bias;  // [F]
  Elements out;            // [rows, F]; to the backward its gradient
  int64_t row_stride;
  int rows, width;
  int function;  // 0: x · (1 + erf(x / √2)) / 2; 1: max(x, 0); 2: x · sigmoid(x · (linear + cubic · x²))
  float linear, cubic;
};

struct BiasActBackward {
  BiasAct of;
  Elements d_x, d_up;       // as x and up
  float *partials, *of_up;  // [blocks, F], rows partials_stride apart: sums of d_x and of d_up; null: not wanted
  int64_t partials_stride;
  int rows_per_block;
};

// Of all heads' queries, keys or values: [B, H, T, D/H], any strides.
struct HeadsGradient {
  Elements elements;
  int64_t batch, head, token, value;  // strides
};

// d_qkv[b, t, 0 to 2, h, :] = d_q, d_k, d_v[b, h, t, :]
struct SplitHeads {
  HeadsGradient d_q, d_k, d_v;
  Elements d_qkv;        // [B, T, 3, D], of their type
  float* partials;       // [blocks, 3, D]: its sums over rows; null: not wanted
  int64_t packed_width;  // 3 * D
  int rows, rows_per_block, width, head_width;  // rows: B * T
  Divider over_tokens;
};

struct SumRows {
  const void* matrix;  // [rows, columns], rows row_stride apart
  float* sums;         // [splits, columns]: each split sums rows_per_split rows
  int64_t columns, row_stride;
  int rows, rows_per_split;
};

// sums[split, segment, n] = sum of the patch rows of a segment's part whose key is n, in the order they stand in.
struct SumByKey {
  const void* grad;     // [B, R+kept, D]
  const int64_t* keys;  // [B, kept]; a key outside 0..patches-1 is nobody's
  void* sums;           // [splits, segments, patches, D]
  int segments, rows;   // rows of a segment: B * kept in one segment, or kept in each of B
  int rows_per_split, kept, prefix_rows, patches, width;
};

// Rows and values of a tile of W', where it is made of tiles: of 16-bit values, as warpgroups read them.
constexpr int WEIGHT_TILE_ROWS = simt::WARPGROUP_COLUMNS, WEIGHT_TILE_VALUES = 64;

// What the forward product multiplies with and starts from. k runs as PatchEmbed says, behind k_length W' is zero.
//
// W' = round(W * weight_scale) is a matrix, or tiles of one, each as it is to lie in shared memory, those of the same rows
// one behind the other: so that a bulk copy moves a tile. The matrix is then whole tiles, with zeros behind the width.
struct PrepareWeight {
  const void* weight;      // [D, C, P_h, P_w]
  const void* bias;        // [D]; null: none
  const void* positions;   // [N, D] or [R+N, D]; null: none
  const void* prefix;      // [R, D]; null where R = 0
  const float* constants;  // [4, C]: weight_scale, pixel_shift, bias_shift, pixel_scale
  void* prepared;          // W' [weight_rows, weight_length] in the compute type
  float* normaliser;       // [2, k_padded]: pixel_shift and pixel_scale of every k, 0 behind; null: not wanted
  float* table;            // [R+N, D]: prefix + position, or bias + sum_k W' bias_shift * inverse_factor + position
  Type weight_type, bias_type, positions_type, prefix_type;
  int width, channels, patch_height, patch_width, k_length, k_padded;
  int weight_rows, weight_length;
  int prefix_rows, patches, position_rows;
  bool channels_last, in_tiles;
  float inverse_factor;  // 1/256 for uint8 images, else 1
};

// The weight as the image gradient's product multiplies it: transposed, unscaled.
struct TransposeWeight {
  const void* weight;      // [D, C, P_h, P_w]
  const float* constants;  // [4, C]: of the image gradient; its pixel_scale is used
  void* transposed;        // [k_length, width_padded] in the compute type, zero behind the width
  float* scale;            // [k_length]: pixel_scale of every k
  Type weight_type;
  int width, width_padded, channels, patch_height, patch_width, k_length;
  bool channels_last;
};

// d_weight = (sum over splits of parts + d_bias * bias_shift) * weight_scale * inverse_factor, in the weight's order.
struct FinishWeightGradient {
  const float* parts;      // [splits, D, k_padded]
  const float* d_bias;     // [D]; null: no mean
  const float* constants;  // [4, C]
  void* d_weight;          // [D, C, P_h, P_w]
  Type weight_type;
  int splits, width, channels, patch_height, patch_width, k_length, k_padded;
  bool channels_last;
  float inverse_factor;
};

// Where a value of a patch lies.
struct PixelPlace {
  int plane, row, value;
};

// How far planes and rows of an image lie apart.
struct Strides {
  int64_t plane, row;
};

// Where the patch of a row lies in images of any sizes: its origin, and the strides of its image, in elements.
struct PackedPlace {
  int64_t origin;
  int plane_stride, row_stride;
};

// What the patch of a row becomes: the row of the table that is its position, and the row of the sequence.
struct PackedToken {
  int position, token;
};

// Images of any sizes, one behind the other, as fastvit/kernels/packed_images.py describes them.
struct PackedRows {
  const int64_t* table;   // [8, count]
  PackedPlace* places;    // [rows]; null: images of one size
  PackedToken* tokens;    // [rows]
  int count, prefix_rows, rows;  // images; of each; patches of all
  int patch_height, stretch, longest, positions;  // longest: patches of an image, at most
};

// sums[r] and sums[R + n]: of the gradient's rows that are r-th in the prefix of an image, and that have position n.
struct SumPositions {
  PackedRows images;
  const void* grad;  // [rows + count * R, D]
  float* sums;       // [R + positions, D]
  int width;
};

// A patch is planes of rows of contiguous values: C planes of P_h rows of P_w values in an NCHW image, one plane of P_h
// rows of P_w·C values in an NHWC one. The reduction index is k = (plane * patch_height + row) * stretch + value.
struct Patches {
  const void* images;       // [B, ...], strides below
  const float* normaliser;  // [2, k_padded]: shift and scale of the pixel at every k; null: pixels as they are
  const int64_t* keep;      // [B, kept]: which patches; null: all
  int64_t batch_stride, plane_stride, row_stride;  // of the images
  int batch, patches, kept, stretch, patch_height, k_length, k_padded;
  Divider over_kept, over_grid_width;
  PixelPlace step;  // from a k to that of the next step, of the forward products
  PackedRows packed;  // places: null where images have one size

  SIMT_BOTH Strides strides() const { return {plane_stride, row_stride}; }
  SIMT_BOTH int rows() const { return batch * kept; }
  SIMT_BOTH bool has_patch(int64_t which) const { return which >= 0 && which < patches; }
  SIMT_BOTH PixelPlace place_of(int k) const {
    const int row = k / stretch, plane = row / patch_height;
    return {plane, row - plane * patch_height, k - row * stretch};
  }
};

// tokens[m, d] = scale * sum_k pixel(m, k) W'[d, k] + table[position of m, d]
struct PatchEmbed {
  Patches pixels;
  const void* weight;  // W', as PrepareWeight says; in tiles where has_stream
  const float* table;  // [R+N, D]: what every row of the sequence starts from; packed [R+1, D], and positions
  void* tokens;        // [B, R+kept, D]
  Type tokens_type;
  int prefix_rows, width;
  float scale;  // of the sums
  Elements positions;  // [P, D], of packed images
};

// d_images[m, k] = scale[k] * sum_d grad[m, d] W[d, k]: the forward product again, with gradients for pixels.
struct ImageGradient {
  Patches gradients;   // a patch for each token: one plane of one row of D values
  const void* weight;  // [k_length, width_padded], the transposed weight
  const float* scale;  // [k_length]
  Patches target;      // whose images, here, are written
  Type target_type;
  bool is_wide;  // eight pixels can be stored at once
};

// dW' = sum over patches of gradient x pixels, the patches divided into splits whose sums are added afterwards.
struct WeightGradient {
  Patches pixels;
  const void* grad;  // [B, R+kept, D], of the compute type
  float* parts;      // [splits, D, k_padded]
  int prefix_rows, width, rows_per_split;  // a multiple of the rows of a step
};

}  // namespace fastvit
