"""torchvision's Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastvit import branches, trunk
from fastvit.guards import attribute, why_not_plain, why_not_plain_parameters, why_not_plain_tensor
from fastvit.interop.host import Fused, Part, why_not_table
from fastvit.interop.trunk import TrunkBlock
from fastvit.stream import Result, Setup

__all__ = ["MIXINS", "TRUNK"]


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


class EncoderBlock(TrunkBlock):
    """The block of all of them."""

    hosts = ("torchvision.models.vision_transformer.EncoderBlock",)
    form = trunk.Names("ln_1", "self_attention", "dropout"), trunk.Names("ln_2", "mlp")

    @staticmethod
    def call(module: Any, x: Tensor, **options: Any) -> Tensor:
        if isinstance(module, nn.MultiheadAttention):
            return module(x, x, x, need_weights=False)[0]
        return module(x)

    def _halves(self, setup: Setup, options: dict[str, Any], ends: bool = False) -> tuple[trunk.Half, trunk.Half]:
        first, second = super()._halves(setup, options, ends)
        attention, dropout = attribute(self, "self_attention"), attribute(self, "dropout")
        if not first.why_whole and branches.is_dropping(dropout):
            # The host's result has tokens before samples in memory, and random numbers are drawn in that order.
            whole = "self_attention has a dropout behind it"
            call = self.call
            first = first._replace(branch=lambda x: Result(call(attention, x.tensor())), why_whole=whole)
        return first, second


def _plan_attention(module: Any, setup: Setup) -> branches.Run:
    """nn.MultiheadAttention of tokens with themselves, without its copies of packed queries, keys and values."""
    weight, bias = attribute(module, "in_proj_weight"), attribute(module, "in_proj_bias")
    dropout = module.dropout if module.training else 0.0
    attend = branches.attend_packed(weight, bias, module.num_heads, setup, dropout=dropout)
    out = attribute(module, "out_proj")
    last = branches.product_of(attribute(out, "weight"), attribute(out, "bias"), setup)
    return lambda x: last(attend(x))


def _why_no_attention(module: Any) -> str:
    if not module.batch_first or not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "is a MultiheadAttention of another form"
    out = attribute(module, "out_proj")
    return why_not_plain(out, nn.modules.linear.NonDynamicallyQuantizableLinear) or why_not_plain_parameters(out)


def _plan_mlp(module: Any, setup: Setup) -> branches.Run:
    """A linear layer, its activation, dropouts, a linear layer and its dropout."""
    first, act, *between, last, dropout = module._modules.values()
    return branches.plan_mlp(branches.MLPLayers(first, act, between, last, dropout), setup)


def _why_no_mlp(module: Any) -> str:
    parts: list[Any] = [*module._modules.values()]
    fits = len(parts) >= 4 and isinstance(parts[-2], nn.Linear) and isinstance(parts[-1], nn.Dropout)
    return "" if fits else "ends in no linear layer and its dropout"


branches.know(
    branches={
        nn.MultiheadAttention.forward: branches.Branch(_plan_attention, _why_no_attention),
        nn.Sequential.forward: branches.Branch(_plan_mlp, _why_no_mlp),
    }
)
TRUNK: tuple[type[TrunkBlock], ...] = (EncoderBlock,)
MIXINS: tuple[type[Fused], ...] = (VisionTransformer,)
