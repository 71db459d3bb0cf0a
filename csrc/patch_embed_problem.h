// From tensors to what kernels are told: sizes, and the launches before and behind a product that patch_embed and
// patch_embed_packed have in common.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "ops.h"
#include "patch_embed_launch.h"
#include "prepare_weight.h"

namespace fastvit {

constexpr float UINT8_SCALE = 256.0f;  // the factor in W' of uint8 images: fastvit/kernels/normalisation.py

inline int padded(int64_t count, int unit = EIGHT) { return static_cast<int>((count + unit - 1) / unit * unit); }

// Strides of dimensions of size 1 mean nothing.
inline int64_t stride(const View& view, int dimension) { return view.sizes[dimension] > 1 ? view.strides[dimension] : 0; }

// What kernels share of an op's sizes.
struct Problem {
  int width, channels, patch_height, patch_width, k_length, k_padded;
  bool channels_last;

  Problem(const View& images, const View& weight)
      : width(weight.size(0)), channels(weight.size(1)), patch_height(weight.size(2)), patch_width(weight.size(3)),
        k_length(channels * patch_height * patch_width), k_padded(padded(k_length)), channels_last(!is_nchw(images)) {}

  Patches patches(const View& images, const View& keep) const {
    Patches p{};
    p.images = images.data;
    p.keep = static_cast<const int64_t*>(keep.data);
    p.batch_stride = stride(images, 0), p.row_stride = stride(images, 2);
    p.plane_stride = channels_last ? 0 : stride(images, 1);
    const int grid_width = images.size(3) / patch_width;
    p.batch = images.size(0), p.patches = images.size(2) / patch_height * grid_width;
    p.stretch = channels_last ? patch_width * channels : patch_width, p.patch_height = patch_height;
    p.k_length = k_length, p.k_padded = k_padded;
    p.kept = keep ? keep.size(1) : p.patches;
    p.over_kept = Divider(p.kept), p.over_grid_width = Divider(grid_width);
    return p;
  }

  // The shape of the weight, for the kernels that read it.
  template <class Parameters>
  void describe(Parameters& p) const {
    p.width = width, p.channels = channels, p.patch_height = patch_height, p.patch_width = patch_width;
    p.k_length = k_length, p.channels_last = channels_last;
  }
};

template <class Launch>
void with_compute(Type compute, Launch launch) {
  switch (compute) {
#if !defined(FASTVIT_FEW_TYPES)
    case Type::FLOAT16: return launch(half{});
#endif
    case Type::BFLOAT16: return launch(bfloat16{});
    case Type::FLOAT32: return launch(float{});
    default: throw std::invalid_argument("compute: float32, float16 or bfloat16");
  }
}

// Pixels that are converted anyway are normalised on the way.
inline bool is_converted(const PatchEmbedInputs& inputs) { return inputs.images.type != inputs.compute; }

inline float inverse_factor(const PatchEmbedInputs& inputs) {
  return inputs.images.type == Type::UINT8 ? 1.0f / UINT8_SCALE : 1.0f;
}

// What the normaliser is made of, and room for it where pixels are converted.
inline PrepareWeight describe_normaliser(const PatchEmbedInputs& inputs, const Problem& problem, const Queue& queue) {
  PrepareWeight p{};
  problem.describe(p);
  p.constants = static_cast<const float*>(inputs.constants.data), p.k_padded = problem.k_padded;
  if (is_converted(inputs)) p.normaliser = queue.scratch<float>("normaliser", int64_t{2} * p.k_padded);
  return p;
}

// W', the table and the normaliser.
inline PrepareWeight prepare(const PatchEmbedInputs& inputs, const Problem& problem, const Patches& patches,
                             int prefix_rows, const Queue& queue) {
  PrepareWeight p = describe_normaliser(inputs, problem, queue);
  p.weight = inputs.weight.data, p.bias = inputs.bias.data;
  p.positions = inputs.positions.data, p.prefix = inputs.prefix.data;
  p.weight_type = inputs.weight.type, p.bias_type = inputs.bias.type;
  p.positions_type = inputs.positions.type, p.prefix_type = inputs.prefix.type;
  p.prefix_rows = prefix_rows, p.patches = patches.patches;
  p.position_rows = inputs.positions ? inputs.positions.size(0) : 0;
  p.inverse_factor = inverse_factor(inputs);
  p.in_tiles = has_stream(patches, p.width, inputs.images.type, inputs.compute, queue);
  p.weight_rows = p.in_tiles ? padded(p.width, WEIGHT_TILE_ROWS) : p.width;
  p.weight_length = p.in_tiles ? padded(p.k_length, WEIGHT_TILE_VALUES) : p.k_padded;
  const int64_t weights = static_cast<int64_t>(p.weight_rows) * p.weight_length;
  p.prepared = queue.scratch<unsigned char>("prepared weight", weights * bytes_of(inputs.compute));
  p.table = queue.scratch<float>("table", static_cast<int64_t>(prefix_rows + p.patches) * p.width);
  prepare_weight(inputs.compute, p, queue);
  return p;
}

// dW' by `launch`, in parts whose sums make d_weight; p has the pixels, the gradient and the prefix. Without a d_bias
// there is no mean.
template <class Launch>
void sum_weight_gradient(const PatchEmbedInputs& inputs, const Problem& problem, WeightGradient p, int rows,
                         const WeightGradientTile& tile, const View& d_weight, const float* d_bias,
                         const Queue& queue, Launch launch) {
  const int tiles = simt::blocks_for(p.width, tile.columns) * simt::blocks_for(problem.k_padded, tile.values);
  const int splits = std::max(1, std::min(tile.blocks / tiles, simt::blocks_for(rows, 4 * WEIGHT_GRADIENT_STEP)));
  const int steps = std::max(1, simt::blocks_for(simt::blocks_for(rows, splits), WEIGHT_GRADIENT_STEP));
  p.rows_per_split = steps * WEIGHT_GRADIENT_STEP;

  FinishWeightGradient finish{};
  problem.describe(finish);
  finish.splits = simt::blocks_for(rows, p.rows_per_split), finish.k_padded = problem.k_padded;
  p.parts = queue.scratch<float>("parts", static_cast<int64_t>(finish.splits) * p.width * problem.k_padded);
  const PrepareWeight prepared = describe_normaliser(inputs, problem, queue);
  if (prepared.normaliser) prepare_normaliser(prepared, queue);
  p.pixels.normaliser = prepared.normaliser;
  with_compute(inputs.compute, [&](auto compute) { launch(compute, p); });
  finish.parts = p.parts, finish.d_bias = d_bias, finish.d_weight = d_weight.data;
  finish.constants = static_cast<const float*>(inputs.constants.data);
  finish.weight_type = inputs.weight.type, finish.inverse_factor = inverse_factor(inputs);
  finish_weight_gradient(finish, queue);
}

}  // namespace fastvit
