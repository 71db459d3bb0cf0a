// patch_embed and patch_embed_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "patch_embed.h"

namespace fastvit {
namespace {

// Sizes of a problem, which both directions check.
struct Sizes {
  int64_t batch, channels, patches, kept, prefix_rows, width;

  Sizes(const View& images, const View& weight, const View& keep, int64_t prefix_rows)
      : batch(images.sizes[0]), channels(images.sizes[1]), prefix_rows(prefix_rows), width(weight.sizes[0]) {
    const int64_t *image = images.sizes, *patch = weight.sizes;
    require(channels == patch[1], "images: ", channels, " channels, but weight expects ", patch[1]);
    require(image[2] > 0 && image[2] % patch[2] == 0 && image[3] > 0 && image[3] % patch[3] == 0, "images: ", image[2],
            " x ", image[3], " is not a positive multiple of the patch, ", patch[2], " x ", patch[3]);
    patches = image[2] / patch[2] * (image[3] / patch[3]);
    kept = keep ? keep.sizes[1] : patches;
    require(!keep || keep.sizes[0] == batch, "keep: expected [", batch, ", N_keep], got ", keep);
    require(std::max(image[2], image[3]) < INT32_LIMIT, "images: height and width must be < 2^31, got ", images);
    check_fits("images", batch, prefix_rows + std::max(patches, kept), width);
    check_weight_fits(weight);
  }

  int64_t table_rows() const { return prefix_rows + patches; }
  int64_t token_rows() const { return prefix_rows + kept; }
};

// The images as kernels can read them.
View read_images(Call& call, const Tensor& images) {
  const View view = call.read("images", images, 4, "[B, C, H, W]", PIXELS);
  return view.sizes[0] == 0 || can_read(view) ? view : call.copy("images", images, view.type);
}

View read_keep(Call& call, const MaybeTensor& keep) {
  return call.read_contiguous("keep", keep, 2, "[B, N_keep]", {Type::INT64});
}

// images [B, C, H, W], weight [D, C, P_h, P_w] → [B, R+N, D] in dtype, or [B, R+N_keep, D] with keep
Tensor patch_embed_cuda(const Tensor& images, const Tensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& pos_embed, const MaybeTensor& prefix, const MaybeTensor& keep,
                        const Tensor& constants, ScalarType compute_dtype, ScalarType dtype, bool tf32) {
  Call call("images", images);
  PatchEmbedInputs inputs{};
  inputs.images = read_images(call, images);
  inputs.weight = read_weight(call, weight);
  read_tables(call, inputs, bias, pos_embed, prefix);
  inputs.keep = read_keep(call, keep);
  inputs.compute = type_of("compute_dtype", compute_dtype, FLOATS);
  inputs.tf32 = tf32;
  const Type type = type_of("dtype", dtype, FLOATS);
  const Sizes sizes(inputs.images, inputs.weight, inputs.keep, inputs.prefix ? inputs.prefix.sizes[0] : 0);
  const int64_t width = sizes.width;
  if (inputs.positions) check_rows("pos_embed", inputs.positions, sizes.patches, sizes.prefix_rows, width);
  inputs.constants = read_constants(call, "constants", constants, sizes.channels);

  const Tensor tokens = call.empty({sizes.batch, sizes.token_rows(), width}, type);
  if (sizes.batch * sizes.token_rows() == 0) return tokens;
  patch_embed(inputs, call.write("tokens", tokens, type), call.queue());
  call.finish();
  return tokens;
}

// Laid out as the images, or as NCHW where kernels can't write their layout.
Tensor empty_image_gradient(const Call& call, const Tensor& images, const View& view) {
  const Tensor same = call.empty_like(images, view.type);
  View layout = view;
  for (int i = 0; i < 4; i++) layout.strides[i] = same.stride(i);
  if (view.sizes[0] == 0 || can_read(layout)) return same;
  return call.empty({view.sizes[0], view.sizes[1], view.sizes[2], view.sizes[3]}, view.type);
}

// grad [B, R+N, D] → d_images, d_weight, d_bias [D] and d_rows [R+N, D] float32; of size 0 where not needed
std::tuple<Tensor, Tensor, Tensor, Tensor> patch_embed_backward_cuda(
    const Tensor& grad, const Tensor& product_grad, const Tensor& images, const Tensor& weight,
    const MaybeTensor& keep, const Tensor& constants, const Tensor& constants_of_images, ScalarType compute_dtype,
    int64_t prefix_rows, bool tf32, bool has_mean, const std::vector<bool>& needs) {
  Call call("images", images);
  require(needs.size() == 4, "needs: expected 4 values, for images, weight, bias and rows; got ", needs.size());
  require(prefix_rows >= 0, "prefix_rows: ", prefix_rows, " is less than 0");
  const bool need_images = needs[0], need_weight = needs[1], need_bias = needs[2], need_rows = needs[3];
  PatchEmbedInputs inputs{};
  inputs.images = read_images(call, images);
  inputs.weight = read_weight(call, weight);
  inputs.keep = read_keep(call, keep);
  inputs.compute = type_of("compute_dtype", compute_dtype, FLOATS);
  inputs.tf32 = tf32, inputs.has_mean = has_mean;
  const Sizes sizes(inputs.images, inputs.weight, inputs.keep, prefix_rows);
  inputs.constants = read_constants(call, "constants", constants, sizes.channels);

  PatchEmbedGradients gradients{};
  const auto read_grad = [&](const char* name, const Tensor& tensor, Types accepted) {
    const View view = call.read_contiguous(name, tensor, 3, "[B, R+N, D]", accepted);
    const bool fits = view.sizes[0] == sizes.batch && view.sizes[1] == sizes.token_rows();
    require(fits && view.sizes[2] == sizes.width, name, ": expected [", sizes.batch, ", ", sizes.token_rows(), ", ",
            sizes.width, "], got ", view);
    return view;
  };
  gradients.grad = read_grad("grad", grad, FLOATS);
  if (need_images || need_weight) gradients.product_grad = read_grad("product_grad", product_grad, {inputs.compute});
  if (need_images) {
    gradients.constants_of_images = read_constants(call, "constants_of_images", constants_of_images, sizes.channels);
  }

  const Type image_type = inputs.images.type, weight_type = inputs.weight.type;
  require(!need_images || image_type != Type::UINT8, "needs: images of Byte have no gradient");
  const auto [D, C, P_h, P_w] = inputs.weight.sizes;
  const Tensor d_images = need_images ? empty_image_gradient(call, images, inputs.images) : call.empty({0}, image_type);
  const Tensor d_weight = need_weight ? call.empty({D, C, P_h, P_w}, weight_type) : call.empty({0}, weight_type);
  const Tensor d_bias = call.empty({need_bias ? D : 0}, Type::FLOAT32);
  const Tensor d_rows = need_rows ? call.empty({sizes.table_rows(), D}, Type::FLOAT32) : call.empty({0}, Type::FLOAT32);
  if (need_images) gradients.d_images = call.write("d_images", d_images, image_type);
  if (need_weight) gradients.d_weight = call.write("d_weight", d_weight, weight_type);
  if (need_bias) gradients.d_bias = call.write("d_bias", d_bias, Type::FLOAT32);
  if (need_rows) gradients.d_rows = call.write("d_rows", d_rows, Type::FLOAT32);
  patch_embed_backward(inputs, static_cast<int>(prefix_rows), gradients, call.queue());
  call.finish();
  return {d_images, d_weight, d_bias, d_rows};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def(
      "patch_embed_cuda(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? keep, "
      "Tensor constants, ScalarType compute_dtype, ScalarType dtype, bool tf32) -> Tensor");
  m.def(
      "patch_embed_backward_cuda(Tensor grad, Tensor product_grad, Tensor images, Tensor weight, Tensor? keep, "
      "Tensor constants, Tensor constants_of_images, ScalarType compute_dtype, int prefix_rows, bool tf32, "
      "bool has_mean, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("patch_embed_cuda", TORCH_BOX(&Guarded<&patch_embed_cuda>::run));
  m.impl("patch_embed_backward_cuda", TORCH_BOX(&Guarded<&patch_embed_backward_cuda>::run));
}
