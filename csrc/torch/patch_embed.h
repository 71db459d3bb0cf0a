// What the ops of patch_embed read alike, whatever their images.
#pragma once

#include <algorithm>

#include "../ops.h"
#include "call.h"

namespace fastvit {

inline View read_weight(Call& call, const Tensor& weight) {
  const View view = call.read_contiguous("weight", weight, 4, "[D, C, P_h, P_w]", FLOATS);
  require(*std::min_element(view.sizes, view.sizes + 4) > 0, "weight: every size must be at least 1, got ", view);
  return view;
}

inline View read_constants(Call& call, const char* name, const Tensor& constants, int64_t channels) {
  const View view = call.read_contiguous(name, constants, 2, "[4, C]", {Type::FLOAT32});
  require(view.sizes[0] == 4 && view.sizes[1] == channels, name, ": expected [4, ", channels, "], got ", view);
  return view;
}

// Kernels pad the rows of the weight, by less than this, and count its values in 32 bits.
inline void check_weight_fits(const View& weight) {
  constexpr int64_t PADDING = 128;
  const int64_t* patch = weight.sizes;
  require(patch[0] * (patch[1] * patch[2] * patch[3] + PADDING) < INT32_LIMIT, "weight: ", weight,
          " has 2^31 values, or nearly so");
}

// Bias, positions and prefix, of which the op checks the rows of positions itself.
inline void read_tables(Call& call, PatchEmbedInputs& inputs, const MaybeTensor& bias, const MaybeTensor& positions,
                        const MaybeTensor& prefix) {
  const int64_t width = inputs.weight.sizes[0];
  inputs.bias = call.read_contiguous("bias", bias, 1, "[D]", FLOATS);
  inputs.positions = call.read_contiguous("pos_embed", positions, 2, "[rows, D]", FLOATS);
  inputs.prefix = call.read_contiguous("prefix", prefix, 2, "[R, D]", FLOATS);
  require(!inputs.bias || inputs.bias.sizes[0] == width, "bias: expected [", width, "], got ", inputs.bias);
  require(!inputs.prefix || inputs.prefix.sizes[1] == width, "prefix: expected [R, ", width, "], got ", inputs.prefix);
}

}  // namespace fastvit
