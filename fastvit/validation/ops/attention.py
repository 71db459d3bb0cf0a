"""`attention` as the validator knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import reference
from fastvit.validation import faults
from fastvit.validation.cases import Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors


@dataclass
class AttentionInputs(Inputs):
    """The tensors qkv and bias, and the rest of the arguments."""

    num_heads: int = 1
    scale: float | None = None
    attn_mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False


@dataclass(frozen=True)
class AttentionCase(Case[AttentionInputs]):
    """One input of `attention`, all but the dtype. `width` is a head's."""

    tokens: int = 9
    heads: int = 3
    layout: str = "contiguous"  # of qkv: contiguous, sliced_batch, sliced_rows
    bias: bool = True
    scale: float | None = None
    sharpness: float = 1.0  # queries and keys are so many times as large

    def make(self, draw: Draw) -> AttentionInputs:
        width = 3 * self.heads * self.width
        qkv = draw.laid_out((self.batch, self.tokens, width), self.layout)
        qkv[..., : width * 2 // 3] *= self.sharpness
        return AttentionInputs(
            tensors={
                "qkv": qkv,
                "bias": draw.normal(width, dtype=self.table_dtype(draw.compute)) if self.bias else None,
            },
            grad=draw.normal(self.batch, self.tokens, width // 3, dtype=draw.compute),
            compute=draw.compute,
            num_heads=self.heads,
            scale=self.scale,
        )


def plain(inputs: AttentionInputs, tensors: Tensors) -> Tensor:
    """PyTorch's own attention on views of a packed projection, whose bias gradient is summed in the layer's dtype."""
    qkv = tensors["qkv"]
    assert qkv is not None
    heads = reference.split_heads(qkv, tensors["bias"], inputs.num_heads)
    return F.scaled_dot_product_attention(*heads, scale=inputs.scale).transpose(1, 2).flatten(2)


def _scale_doubled(run: Run, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return run({**arguments, "scale": arguments["scale"] * 2})


def _last_token_unseen(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    out, logsums = run({**arguments, "qkv": arguments["qkv"][:, :-1]})
    return F.pad(out, (0, 0, 0, 1)), F.pad(logsums, (0, 1))


def _keys_take_gradients_of_queries(run: Run, arguments: Arguments) -> tuple[Tensor, Tensor]:
    d_qkv, sums = run(arguments)
    d_q, d_k, d_v = d_qkv.chunk(3, -1)
    return torch.cat((d_k, d_q, d_v), -1), sums


_A = AttentionCase
OP = Op(
    tiny=(
        _A("heads of 64, under autocast", width=64, tokens=37, parameters="mixed"),
        _A("more than a tile", tokens=50, width=32),
        _A("a head's tokens fill tiles", tokens=64, width=16, heads=2),
        _A("heads of 80", width=80, heads=2, tokens=29),
        _A("heads of 72", width=72, heads=2, parameters="mixed"),
        _A("heads of 17", width=17, heads=5, tokens=33),
        _A("one head of one value", width=1, heads=1, tokens=40),
        _A("sharp weights", width=16, tokens=21, sharpness=6.0),
        _A("scale", width=8, scale=0.7),
        _A("no scale", width=8, scale=0.0),
        _A("no bias", bias=False),
        _A("sliced batch", layout="sliced_batch", width=8, heads=4),
        _A("sliced rows", layout="sliced_rows"),
        _A("many images", batch=9, tokens=17, width=8, heads=2, parameters="mixed"),
        _A("one token", batch=1, tokens=1, width=64, heads=6),
        _A("empty batch", batch=0),
    ),
    large=(
        _A("ViT-B, batch 8", batch=8, tokens=197, heads=12, width=64, parameters="mixed"),
        _A("577 tokens", batch=1, tokens=577, heads=2, width=64),
    ),
    quick=3,
    plain=plain,
    faults=(
        Fault("attention: scale doubled", "forward", forward=_scale_doubled),
        Fault("attention: last token unseen", "forward", forward=_last_token_unseen),
        Fault("attention: gradients of queries and keys swapped", "d_qkv", backward=_keys_take_gradients_of_queries),
        Fault("attention: last token missing from the sum", "d_bias", backward=faults.last_token_missing),
    ),
)
