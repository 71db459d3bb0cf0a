"""torchvision's Vision Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastvit.interop.host import Fused, projection_refusal

__all__ = ["MIXINS"]


class Encoder(Fused):
    """The encoder, told where the positions are in its input already."""

    hosts = ()

    def forward(self, input: Tensor, positioned: bool = False) -> Tensor:
        if not positioned:
            return super().forward(input)
        return self.ln(self.layers(self.dropout(input)))


class VisionTransformer(Fused):
    """vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, and all else of that class without a convolutional stem."""

    hosts = ("torchvision.models.vision_transformer.VisionTransformer",)
    overrides = ("forward", "_process_input")

    conv_proj: nn.Conv2d
    encoder: Any

    @classmethod
    def refusal(cls, module: Any) -> str:
        if isinstance(module.conv_proj, nn.Sequential):
            return "conv_proj is a convolutional stem: its tokens come from a network of its own"
        return projection_refusal("conv_proj", module.conv_proj)

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection", "positions", "class token"]

    @classmethod
    def companions(cls, module: Any) -> Mapping[str, type[Fused]]:
        return {"encoder": Encoder}

    @classmethod
    def leaves(cls, module: Any) -> Sequence[nn.Module]:
        return [module.conv_proj]

    @classmethod
    def passed_over(cls, module: Any) -> Sequence[nn.Module]:
        # The encoder runs, but what a hook on it would see as its input has positions added.
        return [module.encoder]

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        return module.image_size, module.image_size

    def forward(self, x: Any) -> Any:
        x = self.upright(x)
        size = self.image_size
        if not (self.may_fuse(x) and x.shape[2] == size and x.shape[3] == size):
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
