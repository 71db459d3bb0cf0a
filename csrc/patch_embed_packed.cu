// The ops of patch_embed_packed: from tensors to launches. Which kernel multiplies is chosen in patch_embed_packed.h.
#include <algorithm>
#include <numeric>

#include "dispatch.h"
#include "packed_rows.h"
#include "patch_embed_problem.h"

namespace fastvit {
namespace {

// Of the image that lies first.
uintptr_t base_of(const PackedImages& images) {
  uintptr_t base = UINTPTR_MAX;
  for (int64_t i = 0; i < images.count; i++) base = std::min(base, reinterpret_cast<uintptr_t>(images.images[i].data));
  return base;
}

// The patches of all images, whose strides here are what divides those of each; their rows are placed on the way.
Patches place_patches(const Problem& problem, const PackedImages& images, int prefix_rows, const Queue& queue) {
  Patches p = problem.patches(images.images[0], View());
  const uintptr_t base = base_of(images);
  p.images = reinterpret_cast<const void*>(base);
  p.batch_stride = p.plane_stride = p.row_stride = 0;
  int longest = 0;
  for (int64_t i = 0; i < images.count; i++) {
    const View& image = images.images[i];
    const uintptr_t distance = (reinterpret_cast<uintptr_t>(image.data) - base) / bytes_of(image.type);
    p.batch_stride = std::gcd(p.batch_stride, static_cast<int64_t>(distance));
    p.plane_stride = std::gcd(p.plane_stride, images.channels_last ? 0 : stride(image, 1));
    p.row_stride = std::gcd(p.row_stride, stride(image, 2));
    longest = std::max(longest, image.size(2) / problem.patch_height * (image.size(3) / problem.patch_width));
  }
  // Of the table there is one row behind the prefix, which all patches start from.
  p.batch = p.patches = p.kept = 1;
  PackedRows& packed = p.packed;
  packed.table = static_cast<const int64_t*>(images.table.data);
  packed.count = static_cast<int>(images.count), packed.prefix_rows = prefix_rows;
  packed.rows = static_cast<int>(images.patches), packed.positions = static_cast<int>(images.places);
  packed.patch_height = p.patch_height, packed.stretch = p.stretch;
  packed.longest = longest;
  packed.places = queue.scratch<PackedPlace>("places", packed.rows);
  packed.tokens = queue.scratch<PackedToken>("tokens of rows", packed.rows);
  simt::launch(queue, place_rows, simt::blocks_for(packed.rows, SUM_THREADS), 1, SUM_THREADS, 0, packed);
  return p;
}

Problem problem_of(const PatchEmbedInputs& inputs, const PackedImages& images) {
  if (!images.table) throw std::invalid_argument("table: none, by which a GPU finds the images");
  Problem problem(images.images[0], inputs.weight);
  problem.channels_last = images.channels_last;
  return problem;
}

PatchEmbedInputs with_images(PatchEmbedInputs inputs, const PackedImages& images) {
  inputs.images = images.images[0];
  return inputs;
}

void sum_positions_of(const View& grad, const PackedRows& images, int width, float* sums, const Queue& queue) {
  const SumPositions p{images, grad.data, sums, width};
  const bool is_wide = width % EIGHT == 0 && is_aligned(grad.data) && is_aligned(sums);
  const int64_t pieces = is_wide ? width / EIGHT : width;
  const int blocks = simt::blocks_for((images.prefix_rows + images.positions) * pieces, SUM_THREADS);
  with_type(grad.type, [&](auto t) {
    const auto kernel = is_wide ? sum_positions<decltype(t), EIGHT> : sum_positions<decltype(t), 1>;
    simt::launch(queue, kernel, blocks, 1, SUM_THREADS, 0, p);
  });
}

}  // namespace

void patch_embed_packed(const PatchEmbedInputs& given, const PackedImages& images, const View& tokens,
                        const Queue& queue) {
  PatchEmbedInputs inputs = with_images(given, images);
  const Problem problem = problem_of(inputs, images);
  PatchEmbed p{};
  p.prefix_rows = inputs.prefix ? inputs.prefix.size(0) : 0;
  p.pixels = place_patches(problem, images, p.prefix_rows, queue);
  if (inputs.positions) p.positions = {inputs.positions.data, inputs.positions.type};
  inputs.positions = View();
  const PrepareWeight prepared = prepare(inputs, problem, p.pixels, p.prefix_rows, queue);
  p.pixels.normaliser = prepared.normaliser, p.weight = prepared.prepared, p.table = prepared.table;
  p.tokens = tokens.data, p.tokens_type = tokens.type, p.width = problem.width, p.scale = inverse_factor(inputs);
  with_compute(inputs.compute, [&](auto compute) {
    launch_packed_forward<decltype(compute)>(inputs.images.type, inputs.tf32, p, queue);
  });
}

void patch_embed_packed_backward(const PatchEmbedInputs& given, const PackedImages& images, int prefix_rows,
                                 const PatchEmbedGradients& gradients, const Queue& queue) {
  const PatchEmbedInputs inputs = with_images(given, images);
  const Problem problem = problem_of(inputs, images);
  const Patches patches = place_patches(problem, images, prefix_rows, queue);
  float* d_rows = static_cast<float*>(gradients.d_rows.data);
  float* d_bias = static_cast<float*>(gradients.d_bias.data);
  const bool has_mean = inputs.has_mean && gradients.d_weight;
  if (d_rows || d_bias || has_mean) {
    const int64_t prefix = static_cast<int64_t>(prefix_rows) * problem.width;
    const int positions = patches.packed.positions;
    if (!d_rows) d_rows = queue.scratch<float>("row sums", prefix + static_cast<int64_t>(positions) * problem.width);
    sum_positions_of(gradients.grad, patches.packed, problem.width, d_rows, queue);
    if (d_bias || has_mean) {
      if (!d_bias) d_bias = queue.scratch<float>("bias gradient", problem.width);
      sum_rows(Type::FLOAT32, d_rows + prefix, problem.width, positions, problem.width, d_bias, queue);
    }
  }
  if (!gradients.d_weight) return;
  WeightGradient p{};
  p.pixels = patches, p.grad = gradients.product_grad.data, p.prefix_rows = prefix_rows, p.width = problem.width;
  const WeightGradientTile tile = weight_gradient_tile(p, inputs.images.type, inputs.compute, queue);
  const auto launch = [&](auto compute, const WeightGradient& p) {
    launch_packed_weight_gradient<decltype(compute)>(inputs.images.type, inputs.tf32, p, queue);
  };
  sum_weight_gradient(inputs, problem, p, patches.packed.rows, tile, gradients.d_weight, has_mean ? d_bias : nullptr,
                      queue, launch);
}

}  // namespace fastvit
