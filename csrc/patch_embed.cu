// The ops of patch_embed: from tensors to launches. Which kernel multiplies is chosen in patch_embed_instances.h.
#include "ops.h"

#include <algorithm>

#include "patch_embed_launch.h"
#include "prepare_weight.h"
#include "row_sums.h"

namespace fastvit {

namespace {

constexpr float UINT8_SCALE = 256.0f;  // the factor in W' of uint8 images: fastvit/kernels/normalisation.py

int padded(int64_t count, int unit = EIGHT) { return static_cast<int>((count + unit - 1) / unit * unit); }

// Strides of dimensions of size 1 mean nothing.
int64_t stride(const View& view, int dimension) { return view.sizes[dimension] > 1 ? view.strides[dimension] : 0; }

bool is_nchw(const View& images) { return stride(images, 3) == 1 || images.sizes[3] == 1; }

bool is_nhwc(const View& images) { return stride(images, 1) == 1 && stride(images, 3) == images.sizes[1]; }

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
bool is_converted(const PatchEmbedInputs& inputs) { return inputs.images.type != inputs.compute; }

float inverse_factor(const PatchEmbedInputs& inputs) {
  return inputs.images.type == Type::UINT8 ? 1.0f / UINT8_SCALE : 1.0f;
}

// What the normaliser is made of, and room for it where pixels are converted.
PrepareWeight describe_normaliser(const PatchEmbedInputs& inputs, const Problem& problem, const Queue& queue) {
  PrepareWeight p{};
  problem.describe(p);
  p.constants = static_cast<const float*>(inputs.constants.data), p.k_padded = problem.k_padded;
  if (is_converted(inputs)) p.normaliser = queue.scratch<float>("normaliser", int64_t{2} * p.k_padded);
  return p;
}

// W', the table and the normaliser.
PrepareWeight prepare(const PatchEmbedInputs& inputs, const Problem& problem, const Patches& patches, int prefix_rows,
                      const Queue& queue) {
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

void sum_gradients(const PatchEmbedInputs& inputs, const Patches& patches, int prefix_rows, int width,
                   const View& grad, float* d_rows, const Queue& queue) {
  const int64_t per_sample = static_cast<int64_t>(prefix_rows + patches.kept) * width;
  if (!inputs.keep) return sum_rows(grad.type, grad.data, per_sample, patches.batch, per_sample, d_rows, queue);
  if (prefix_rows) {
    sum_rows(grad.type, grad.data, per_sample, patches.batch, static_cast<int64_t>(prefix_rows) * width, d_rows, queue);
  }
  SumByKey p{};
  p.grad = grad.data, p.keys = patches.keep, p.sums = d_rows + static_cast<int64_t>(prefix_rows) * width;
  p.segments = 1, p.rows = patches.rows(), p.kept = patches.kept;
  p.prefix_rows = prefix_rows, p.patches = patches.patches, p.width = width;
  sum_by_key(grad.type, Type::FLOAT32, p, queue);
}

void weight_gradient(const PatchEmbedInputs& inputs, const Problem& problem, int prefix_rows, const Patches& patches,
                     const PatchEmbedGradients& gradients, const float* d_bias, const Queue& queue) {
  WeightGradient p{};
  p.pixels = patches, p.grad = gradients.product_grad.data, p.prefix_rows = prefix_rows, p.width = problem.width;
  const WeightGradientTile tile = weight_gradient_tile(p, inputs.images.type, inputs.compute, queue);
  const int rows = patches.rows();
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
  with_compute(inputs.compute, [&](auto compute) {
    launch_weight_gradient<decltype(compute)>(inputs.images.type, inputs.tf32, p, queue);
  });
  finish.parts = p.parts, finish.d_bias = d_bias, finish.d_weight = gradients.d_weight.data;
  finish.constants = static_cast<const float*>(inputs.constants.data);
  finish.weight_type = inputs.weight.type, finish.inverse_factor = inverse_factor(inputs);
  finish_weight_gradient(finish, queue);
}

// The gradients of every patch, in the compute type: of the tokens, or with keep the sums of those of the same patch.
Patches gradient_patches(const PatchEmbedInputs& inputs, const Problem& problem, int prefix_rows,
                         const Patches& patches, const View& grad, const Queue& queue) {
  Patches p{};
  p.batch = patches.batch, p.patches = patches.patches, p.patch_height = 1;
  p.stretch = p.k_length = problem.width, p.k_padded = padded(problem.width);
  p.kept = patches.patches, p.over_kept = p.over_grid_width = Divider(patches.patches);
  if (!inputs.keep) {
    p.images = static_cast<const unsigned char*>(grad.data) +
               static_cast<int64_t>(prefix_rows) * problem.width * bytes_of(grad.type);
    p.batch_stride = static_cast<int64_t>(prefix_rows + patches.patches) * problem.width;
    return p;
  }
  SumByKey sum{};
  sum.grad = grad.data, sum.keys = patches.keep, sum.segments = patches.batch, sum.patches = patches.patches;
  sum.rows = sum.kept = patches.kept;
  sum.prefix_rows = prefix_rows, sum.width = problem.width;
  p.batch_stride = static_cast<int64_t>(patches.patches) * problem.width;
  sum.sums = queue.scratch<unsigned char>("patch gradients", patches.batch * p.batch_stride * bytes_of(grad.type));
  p.images = sum.sums;
  sum_by_key(grad.type, grad.type, sum, queue);
  return p;
}

void image_gradient(const PatchEmbedInputs& inputs, int prefix_rows, const Patches& patches,
                    const PatchEmbedGradients& gradients, const Queue& queue) {
  const Problem problem(gradients.d_images, inputs.weight);  // whose layout need not be that of the images
  ImageGradient p{};
  p.target = problem.patches(gradients.d_images, View());
  p.target_type = gradients.d_images.type;
  p.gradients = gradient_patches(inputs, problem, prefix_rows, patches, gradients.product_grad, queue);

  TransposeWeight weight{};
  problem.describe(weight);
  weight.weight = inputs.weight.data, weight.weight_type = inputs.weight.type;
  weight.constants = static_cast<const float*>(gradients.constants_of_images.data);
  weight.width_padded = p.gradients.k_padded;
  const int64_t values = static_cast<int64_t>(problem.k_length) * weight.width_padded;
  weight.transposed = queue.scratch<unsigned char>("transposed weight", values * bytes_of(inputs.compute));
  weight.scale = queue.scratch<float>("scale", problem.k_length);
  transpose_weight(inputs.compute, weight, queue);
  p.weight = weight.transposed, p.scale = weight.scale;
  with_compute(inputs.compute,
               [&](auto compute) { launch_image_gradient<decltype(compute)>(inputs.tf32, p, queue); });
}

}  // namespace

bool can_read(const View& images) { return is_nchw(images) || is_nhwc(images); }

void patch_embed(const PatchEmbedInputs& inputs, const View& tokens, const Queue& queue) {
  const Problem problem(inputs.images, inputs.weight);
  PatchEmbed p{};
  p.pixels = problem.patches(inputs.images, inputs.keep);
  p.prefix_rows = inputs.prefix ? inputs.prefix.size(0) : 0;
  const PrepareWeight prepared = prepare(inputs, problem, p.pixels, p.prefix_rows, queue);
  p.pixels.normaliser = prepared.normaliser, p.weight = prepared.prepared, p.table = prepared.table;
  p.tokens = tokens.data, p.tokens_type = tokens.type, p.width = problem.width, p.scale = inverse_factor(inputs);
  with_compute(inputs.compute, [&](auto compute) {
    launch_forward<decltype(compute)>(inputs.images.type, inputs.tf32, p, queue);
  });
}

void patch_embed_backward(const PatchEmbedInputs& inputs, int prefix_rows, const PatchEmbedGradients& gradients,
                          const Queue& queue) {
  const Problem problem(inputs.images, inputs.weight);
  const Patches patches = problem.patches(inputs.images, inputs.keep);
  float* d_rows = static_cast<float*>(gradients.d_rows.data);
  float* d_bias = static_cast<float*>(gradients.d_bias.data);
  const bool has_mean = inputs.has_mean && gradients.d_weight;
  if (d_rows || d_bias || has_mean) {
    const int64_t prefix = static_cast<int64_t>(prefix_rows) * problem.width;
    if (!d_rows) d_rows = queue.scratch<float>("row sums", prefix + static_cast<int64_t>(patches.patches) * problem.width);
    sum_gradients(inputs, patches, prefix_rows, problem.width, gradients.grad, d_rows, queue);
    if (d_bias || has_mean) {
      if (!d_bias) d_bias = queue.scratch<float>("bias gradient", problem.width);
      sum_rows(Type::FLOAT32, d_rows + prefix, problem.width, patches.patches, problem.width, d_bias, queue);
    }
  }
  if (gradients.d_weight) {
    weight_gradient(inputs, problem, prefix_rows, patches, gradients, has_mean ? d_bias : nullptr, queue);
  }
  if (gradients.d_images) image_gradient(inputs, prefix_rows, patches, gradients, queue);
}

}  // namespace fastvit
