// patch_embed_packed: images of any sizes, one behind the other.
#include "embedding.h"
#include "isa.h"

namespace fastvit::FASTVIT_ISA {

void patch_embed_packed(const PatchEmbedInputs& inputs, const PackedImages& images, const View& tokens,
                        const Queue& queue) {
  const Patches patches(inputs, images, inputs.prefix ? inputs.prefix.sizes[0] : 0, queue);
  with_operand(inputs.compute, [&](auto operand) { embed<decltype(operand)>(inputs, patches, tokens, queue); });
}

// Without the gradient of images: fastvit/native/patch_embed_packed.py has it from PyTorch.
void patch_embed_packed_backward(const PatchEmbedInputs& inputs, const PackedImages& images, int prefix_rows,
                                 const PatchEmbedGradients& gradients, const Queue& queue) {
  const Patches patches(inputs, images, prefix_rows, queue);
  differentiate(inputs, patches, gradients, queue, [&](const View& d_rows) {
    sum_by_position(gradients.grad, gradients.grad.sizes[1], patches, writable<float>(d_rows));
  });
}

}  // namespace fastvit::FASTVIT_ISA

FASTVIT_CHOOSE(patch_embed_packed,
               (const PatchEmbedInputs& inputs, const PackedImages& images, const View& tokens, const Queue& queue),
               (inputs, images, tokens, queue))
FASTVIT_CHOOSE(patch_embed_packed_backward,
               (const PatchEmbedInputs& inputs, const PackedImages& images, int prefix_rows,
                const PatchEmbedGradients& gradients, const Queue& queue),
               (inputs, images, prefix_rows, gradients, queue))
