#include "kernels.h"

#include <stdexcept>

#include "../add_position.h"
#include "../patch_embed_backward.h"
#include "../patch_embed_forward.h"

namespace fastvit {
namespace {

// Calls `use` with a value of the C++ type.
template <class Use>
void with_type(Type type, Use use) {
  switch (type) {
    case Type::FLOAT32: return use(float{});
    case Type::FLOAT16: return use(half{});
    case Type::BFLOAT16: return use(bfloat16{});
    default: throw std::invalid_argument("type: float32, float16 or bfloat16");
  }
}

#if !defined(FASTVIT_FEW_TYPES)

template <class Image, class Compute>
void launch_for(const PatchEmbed& parameters, Type out, simt::Stream& stream) {
  if (out == Type::FLOAT32) return launch_patch_embed<Image, Compute, float>(parameters, stream);
  launch_patch_embed<Image, Compute, Compute>(parameters, stream);
}

template <class Compute>
void launch_for(const PatchEmbed& parameters, Type image, Type out, simt::Stream& stream) {
  if (image == Type::UINT8) return launch_for<uint8_t, Compute>(parameters, out, stream);
  with_type(image, [&](auto i) { launch_for<decltype(i), Compute>(parameters, out, stream); });
}

template <class Compute>
void launch_for(const WeightGradient& parameters, Type image, simt::Stream& stream) {
  if (image == Type::UINT8) return launch_weight_gradient<uint8_t, Compute>(parameters, stream);
  with_type(image, [&](auto i) { launch_weight_gradient<decltype(i), Compute>(parameters, stream); });
}

#endif

}  // namespace

void launch(const AddPosition& parameters, Type in, Type out, simt::Stream& stream) {
  with_type(in, [&](auto i) {
    with_type(out, [&](auto o) { launch_add_position<decltype(i), decltype(o)>(parameters, stream); });
  });
}

void launch(const SumRows& parameters, Type type, simt::Stream& stream) {
  with_type(type, [&](auto t) { launch_sum_rows<decltype(t)>(parameters, stream); });
}

void launch(const PatchEmbed& parameters, Type image, Type compute, Type out, simt::Stream& stream) {
#if defined(FASTVIT_FEW_TYPES)
  if (compute != Type::BFLOAT16 || out != compute) throw std::invalid_argument("built for bfloat16 alone");
  if (image == Type::UINT8) return launch_patch_embed<uint8_t, bfloat16, bfloat16>(parameters, stream);
  launch_patch_embed<bfloat16, bfloat16, bfloat16>(parameters, stream);
#else
  if (out != compute && out != Type::FLOAT32) throw std::invalid_argument("out: the compute type or float32");
  if (compute == Type::FLOAT16) return launch_for<half>(parameters, image, out, stream);
  if (compute == Type::BFLOAT16) return launch_for<bfloat16>(parameters, image, out, stream);
  throw std::invalid_argument("compute: float16 or bfloat16");
#endif
}

void launch(const WeightGradient& parameters, Type image, Type compute, simt::Stream& stream) {
#if defined(FASTVIT_FEW_TYPES)
  if (compute != Type::BFLOAT16) throw std::invalid_argument("built for bfloat16 alone");
  if (image == Type::UINT8) return launch_weight_gradient<uint8_t, bfloat16>(parameters, stream);
  launch_weight_gradient<bfloat16, bfloat16>(parameters, stream);
#else
  if (compute == Type::FLOAT16) return launch_for<half>(parameters, image, stream);
  if (compute == Type::BFLOAT16) return launch_for<bfloat16>(parameters, image, stream);
  throw std::invalid_argument("compute: float16 or bfloat16");
#endif
}

}  // namespace fastvit
