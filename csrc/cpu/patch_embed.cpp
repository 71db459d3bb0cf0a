// patch_embed: a batch of images of one size.
#include "embedding.h"
#include "isa.h"

namespace fastvit::FASTVIT_ISA {

void patch_embed(const PatchEmbedInputs& inputs, const View& tokens, const Queue& queue) {
  const Patches patches(inputs, inputs.prefix ? inputs.prefix.sizes[0] : 0, queue);
  with_operand(inputs.compute, [&](auto operand) { embed<decltype(operand)>(inputs, patches, tokens, queue); });
}

// Without the gradient of images: fastvit/native/patch_embed.py has it from PyTorch.
void patch_embed_backward(const PatchEmbedInputs& inputs, int prefix_rows, const PatchEmbedGradients& gradients,
                          const Queue& queue) {
  const Patches patches(inputs, prefix_rows, queue);
  const View& grad = gradients.grad;
  differentiate(inputs, patches, gradients, queue, [&](const View& d_rows) {
    if (inputs.keep) return sum_by_position(grad, grad.sizes[2], patches, writable<float>(d_rows));
    add_position_backward(grad, d_rows, queue);
  });
}

}  // namespace fastvit::FASTVIT_ISA

#if defined(FASTVIT_ISA_IS_FIRST)
namespace fastvit {
bool can_read(const View& images) { return is_nchw(images) || is_nhwc(images); }
}  // namespace fastvit
#endif

FASTVIT_CHOOSE(patch_embed, (const PatchEmbedInputs& inputs, const View& tokens, const Queue& queue),
               (inputs, tokens, queue))
FASTVIT_CHOOSE(patch_embed_backward,
               (const PatchEmbedInputs& inputs, int prefix_rows, const PatchEmbedGradients& gradients,
                const Queue& queue),
               (inputs, prefix_rows, gradients, queue))
