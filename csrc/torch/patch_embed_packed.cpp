// patch_embed_packed and patch_embed_packed_backward, for tensors of PyTorch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "patch_embed.h"

namespace fastvit {
namespace {

// Images of any sizes as kernels can read them, with the weight that they meet. A GPU's kernels go by a table, which says
// where the images lie, so that these can't be copied here.
struct Packed {
  std::vector<View> views;  // [1, C, H_i, W_i]
  PackedImages images{};

  Packed(Call& call, const std::vector<Tensor>& given, const View& weight, const std::vector<int64_t>& starts,
         const MaybeTensor& table) {
    require(!given.empty(), "images: none");
    require(starts.size() == given.size(), "starts: ", starts.size(), " of them for ", given.size(), " images");
    for (const Tensor& image : given) views.push_back(batch_of_one(call.read("images", image, 3, "[C, H, W]", PIXELS)));
    const auto all = [&](bool (*lies)(const View&)) { return std::all_of(views.begin(), views.end(), lies); };
    // A patch of a single pixel is a column of values in the one order, and lies in the other as it is multiplied.
    const bool may_be_nhwc = all(is_nhwc);
    images.channels_last = may_be_nhwc && (!all(is_nchw) || weight.sizes[2] * weight.sizes[3] == 1);
    for (std::size_t i = 0; i < given.size(); i++) {
      if (!images.channels_last && !is_nchw(views[i])) {
        require(!table, "images: image ", i, " does not lie as all others do");
        views[i] = batch_of_one(call.copy("images", given[i], views[i].type));
      }
      check(views[i], weight, i);
      const int64_t count = views[i].sizes[2] / weight.sizes[2] * (views[i].sizes[3] / weight.sizes[3]);
      require(starts[i] >= 0, "starts: ", starts[i], " is less than 0");
      images.places = std::max(images.places, starts[i] + count);
      images.patches += count;
    }
    images.images = views.data(), images.starts = starts.data(), images.count = static_cast<int64_t>(views.size());
    images.table = call.read_contiguous("table", table, 2, "[8, B]", {Type::INT64});
    require(!images.table || (images.table.sizes[0] == 8 && images.table.sizes[1] == images.count), "table: expected [8, ",
            images.count, "], got ", images.table);
  }

  // All tokens. Kernels count rows in 32 bits.
  int64_t tokens(int64_t prefix_rows) const {
    const int64_t tokens = images.patches + images.count * prefix_rows;
    require(std::max(tokens, prefix_rows + images.places) < INT32_LIMIT, "images: ", tokens, " tokens and ",
            images.places, " positions; there must be less than 2^31 of each");
    return tokens;
  }

 private:
  static View batch_of_one(View image) {
    for (int i = 3; i > 0; i--) image.sizes[i] = image.sizes[i - 1], image.strides[i] = image.strides[i - 1];
    image.sizes[0] = 1, image.strides[0] = 0, image.dimensions = 4;
    return image;
  }

  void check(const View& image, const View& weight, std::size_t i) const {
    const int64_t *size = image.sizes, *patch = weight.sizes;
    require(image.type == views[0].type, "images: of several types");
    require(size[1] == patch[1], "images: image ", i, " has ", size[1], " channels, but weight expects ", patch[1]);
    require(size[2] > 0 && size[2] % patch[2] == 0 && size[3] > 0 && size[3] % patch[3] == 0, "images: image ", i,
            " of ", size[2], " x ", size[3], " is not a positive multiple of the patch, ", patch[2], " x ", patch[3]);
  }
};

// images [C, H_i, W_i], weight [D, C, P_h, P_w] → [Σ R+N_i, D] in dtype. The position of a patch is the row of pos_embed
// [P, D] that comes so many after its image's start.
Tensor patch_embed_packed_cuda(const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& pos_embed,
                               const MaybeTensor& prefix, std::vector<Tensor> images, std::vector<int64_t> starts,
                               const MaybeTensor& table, const Tensor& constants, ScalarType compute_dtype,
                               ScalarType dtype, bool tf32) {
  Call call("weight", weight);
  PatchEmbedInputs inputs{};
  inputs.weight = read_weight(call, weight);
  check_weight_fits(inputs.weight);
  read_tables(call, inputs, bias, pos_embed, prefix);
  inputs.constants = read_constants(call, "constants", constants, inputs.weight.sizes[1]);
  inputs.compute = type_of("compute_dtype", compute_dtype, FLOATS);
  inputs.tf32 = tf32;
  const Type type = type_of("dtype", dtype, FLOATS);
  const int64_t width = inputs.weight.sizes[0], prefix_rows = inputs.prefix ? inputs.prefix.sizes[0] : 0;
  Packed packed(call, images, inputs.weight, starts, table);
  if (inputs.positions) {
    const int64_t rows = inputs.positions.sizes[0];
    require(inputs.positions.sizes[1] == width && rows >= packed.images.places, "pos_embed: expected [",
            packed.images.places, " or more, ", width, "], got ", inputs.positions);
    packed.images.places = rows;
  }
  const Tensor tokens = call.empty({packed.tokens(prefix_rows), width}, type);
  patch_embed_packed(inputs, packed.images, call.write("tokens", tokens, type), call.queue());
  call.finish();
  return tokens;
}

// grad [Σ R+N_i, D] → d_weight, d_bias [D] and d_rows [R+P, D] float32; of size 0 where not needed
std::tuple<Tensor, Tensor, Tensor> patch_embed_packed_backward_cuda(
    const Tensor& grad, const Tensor& product_grad, const Tensor& weight, std::vector<Tensor> images,
    std::vector<int64_t> starts, const MaybeTensor& table, const Tensor& constants, ScalarType compute_dtype,
    int64_t prefix_rows, int64_t places, bool tf32, bool has_mean, const std::vector<bool>& needs) {
  Call call("weight", weight);
  require(needs.size() == 3, "needs: expected 3 values, for weight, bias and rows; got ", needs.size());
  require(prefix_rows >= 0, "prefix_rows: ", prefix_rows, " is less than 0");
  const bool need_weight = needs[0], need_bias = needs[1], need_rows = needs[2];
  PatchEmbedInputs inputs{};
  inputs.weight = read_weight(call, weight);
  check_weight_fits(inputs.weight);
  inputs.constants = read_constants(call, "constants", constants, inputs.weight.sizes[1]);
  inputs.compute = type_of("compute_dtype", compute_dtype, FLOATS);
  inputs.tf32 = tf32, inputs.has_mean = has_mean;
  Packed packed(call, images, inputs.weight, starts, table);
  packed.images.places = std::max(packed.images.places, places);

  const int64_t width = inputs.weight.sizes[0], tokens = packed.tokens(prefix_rows);
  PatchEmbedGradients gradients{};
  const auto read_grad = [&](const char* name, const Tensor& tensor, Types accepted) {
    const View view = call.read_contiguous(name, tensor, 2, "[tokens, D]", accepted);
    require(view.sizes[0] == tokens && view.sizes[1] == width, name, ": expected [", tokens, ", ", width, "], got ", view);
    return view;
  };
  gradients.grad = read_grad("grad", grad, FLOATS);
  // The processor, which has no table, reads the gradient as it is.
  if (need_weight && table) gradients.product_grad = read_grad("product_grad", product_grad, {inputs.compute});
  const Type weight_type = inputs.weight.type;
  const auto [D, C, P_h, P_w] = inputs.weight.sizes;
  const Tensor d_weight = need_weight ? call.empty({D, C, P_h, P_w}, weight_type) : call.empty({0}, weight_type);
  const Tensor d_bias = call.empty({need_bias ? D : 0}, Type::FLOAT32);
  const Tensor d_rows =
      need_rows ? call.empty({prefix_rows + packed.images.places, D}, Type::FLOAT32) : call.empty({0}, Type::FLOAT32);
  if (need_weight) gradients.d_weight = call.write("d_weight", d_weight, weight_type);
  if (need_bias) gradients.d_bias = call.write("d_bias", d_bias, Type::FLOAT32);
  if (need_rows) gradients.d_rows = call.write("d_rows", d_rows, Type::FLOAT32);
  patch_embed_packed_backward(inputs, packed.images, static_cast<int>(prefix_rows), gradients, call.queue());
  call.finish();
  return {d_weight, d_bias, d_rows};
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_FRAGMENT(FASTVIT_NAMESPACE, m) {
  m.def(
      "patch_embed_packed_cuda(Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor[] images, "
      "int[] starts, Tensor? table, Tensor constants, ScalarType compute_dtype, ScalarType dtype, bool tf32) -> Tensor");
  m.def(
      "patch_embed_packed_backward_cuda(Tensor grad, Tensor product_grad, Tensor weight, Tensor[] images, int[] starts, "
      "Tensor? table, Tensor constants, ScalarType compute_dtype, int prefix_rows, int places, bool tf32, bool has_mean, "
      "bool[3] needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTVIT_NAMESPACE, FASTVIT_DISPATCH_KEY, m) {
  using namespace fastvit;
  m.impl("patch_embed_packed_cuda", TORCH_BOX(&Guarded<&patch_embed_packed_cuda>::run));
  m.impl("patch_embed_packed_backward_cuda", TORCH_BOX(&Guarded<&patch_embed_packed_backward_cuda>::run));
}
