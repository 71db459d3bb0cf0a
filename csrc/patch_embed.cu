// The ops of patch_embed: from tensors to launches. Which kernel multiplies is chosen in patch_embed_instances.h.
#include "ops.h"

#include <algorithm>

#include "patch_embed_problem.h"
#include "row_sums.h"

namespace fastvit {

namespace {

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
  const auto launch = [&](auto compute, const WeightGradient& p) {
    launch_weight_gradient<decltype(compute)>(inputs.images.type, inputs.tf32, p, queue);
  };
  sum_weight_gradient(inputs, problem, p, patches.rows(), tile, gradients.d_weight, d_bias, queue, launch);
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
