"""torchvision's Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastvit.guards import attribute, why_not_plain_tensor
from fastvit.interop.host import Fused, Part, why_not_table

__all__ = ["MIXINS"]


class Encoder(Fused):
    """The encoder, told where the positions are in its input already."""

    hosts = ()

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return ()

    def forward(self, input: Tensor, positioned: bool = False) -> Tensor:
        if not positioned:
            return super().forward(input)
        return self.ln(self.layers(self.dropout(input)))


class VisionTransformer(Fused):
    """vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, and all else of that class without a convolutional stem."""

    hosts = ("torchvision.models.vision_transformer.VisionTransformer",)
    overrides = ("forward", "_process_input")
    tables = ("class_token",)

    conv_proj: nn.Conv2d
    encoder: Any

    @classmethod
    def refusal(cls, module: Any) -> str:
        if isinstance(module.conv_proj, nn.Sequential):
            return "conv_proj is a convolutional stem: its tokens come from a network of its own"
        return ""

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection", "positions", "class token"]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        # The encoder runs, but what a hook on it would see as its input has positions added.
        projection, encoder = attribute(module, "conv_proj"), attribute(module, "encoder")
        return [Part("conv_proj", projection, nn.Conv2d), Part("encoder", encoder, Encoder)]

    def takes(self, images: Tensor) -> bool:
        return images.shape[2] == self.image_size and images.shape[3] == self.image_size

    def why_not_of(self, images: Tensor) -> str:
        tokens, patch, stride = attribute(self, "class_token"), self.patch_size, attribute(self, "conv_proj").stride
        if stride != (patch, patch):
            return f"patch_size is {patch}, and the stride of conv_proj {stride}"
        rows = (self.image_size // patch) ** 2 + (tokens.shape[1] if tokens.dim() == 3 else 0)
        positions = attribute(attribute(self, "encoder"), "pos_embedding")
        return (
            why_not_table("class_token", tokens)
            or why_not_plain_tensor(positions)
            or why_not_table("encoder.pos_embedding", positions, rows)
        )

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        return module.image_size, module.image_size

    def forward(self, x: Any) -> Any:
        x = self.upright(x)
        if not self.may_fuse(x):
            return super().forward(self.as_the_host_takes_them(x))
        tokens = self.embed(
            x,
            self.conv_proj.weight,
            self.conv_proj.bias,
            pos_embed=self.encoder.pos_embedding,
            prefix=self.class_token,
        )
        return self.heads(self.encoder(tokens, positioned=True)[:, 0])


MIXINS: tuple[type[Fused], ...] = (VisionTransformer,)
