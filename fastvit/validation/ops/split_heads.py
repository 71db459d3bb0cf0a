"""`split_heads` as the validator knows it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvit.validation import faults
from fastvit.validation.cases import Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors


@dataclass
class SplitHeadsInputs(Inputs):
    """The tensors qkv and bias, and how many heads there are."""

    num_heads: int = 1


@dataclass(frozen=True)
class SplitHeadsCase(Case[SplitHeadsInputs]):
    """One input of `split_heads`, all but the dtype. `width` is a head's."""

    tokens: int = 9
    heads: int = 3
    layout: str = "contiguous"  # of qkv: contiguous, sliced_batch, sliced_rows
    # Of the gradients: side by side by "heads" or by "tokens", "packed" already, "turned", every head of a token that
    # is "cut" out of a wider one, or "expanded" from one number a token.
    gradients: str = "tokens"
    bias: bool = True

    def make(self, draw: Draw) -> SplitHeadsInputs:
        width = 3 * self.heads * self.width
        d_q, d_k, d_v = self._gradients(draw)
        return SplitHeadsInputs(
            tensors={
                "qkv": draw.laid_out((self.batch, self.tokens, width), self.layout),
                "bias": draw.normal(width, dtype=self.table_dtype(draw.compute)) if self.bias else None,
            },
            grad=d_q,
            more_grads={"k": d_k, "v": d_v},
            compute=draw.compute,
            num_heads=self.heads,
        )

    def _gradients(self, draw: Draw) -> tuple[Tensor, ...]:
        batch, heads, tokens, width = shape = (self.batch, self.heads, self.tokens, self.width)
        if self.gradients == "packed":
            packed = draw.normal(batch, tokens, 3, heads, width, dtype=draw.compute)
            return packed.permute(2, 0, 3, 1, 4).unbind(0)
        stored = {
            "heads": shape,
            "tokens": (batch, tokens, heads, width),
            "turned": (batch, heads, width, tokens),
            "cut": (batch, tokens, heads, width + 3),
            "expanded": (batch, heads, tokens, 1),
        }[self.gradients]
        three = (draw.normal(*stored, dtype=draw.compute) for _ in range(3))
        axes = {"tokens": (1, 2), "cut": (1, 2), "turned": (2, 3)}.get(self.gradients, (0, 0))
        return tuple(gradient.transpose(*axes)[..., :width].expand(shape) for gradient in three)


def plain(inputs: SplitHeadsInputs, tensors: Tensors) -> tuple[Tensor, ...]:
    """A linear layer with its bias, whose gradients PyTorch stacks and then sums in the layer's dtype."""
    qkv, bias = tensors["qkv"], tensors["bias"]
    assert qkv is not None
    if bias is not None:
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype)
    batch, heads, tokens, width = inputs.grad.shape
    return qkv.reshape(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)


def _keys_and_values_swapped(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    return run({**arguments, "d_k": arguments["d_v"], "d_v": arguments["d_k"]})


def _heads_in_another_order(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    return run({**arguments, "d_q": arguments["d_q"].flip(1)})


def _read_as_if_contiguous(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    d_v = arguments["d_v"]
    return run({**arguments, "d_v": d_v.transpose(1, 2).reshape(d_v.shape)})


_A = SplitHeadsCase
OP = Op(
    tiny=(
        _A("as flash attention leaves them, under autocast", parameters="mixed"),
        _A("by heads", gradients="heads", width=32),
        _A("packed already", gradients="packed", width=16, heads=12),
        _A("one dtype, heads of 80", width=80, heads=2),
        _A("heads of 72, by heads", gradients="heads", width=72, parameters="mixed"),
        _A("heads of 17", width=17, heads=5),
        _A("one head of one value", width=1, heads=1, tokens=40),
        _A("turned", gradients="turned", width=24),
        _A("cut", gradients="cut", width=8),
        _A("expanded", gradients="expanded", width=16),
        _A("no bias", bias=False),
        _A("sliced batch", layout="sliced_batch", width=8, heads=4),
        _A("sliced rows", layout="sliced_rows", gradients="heads"),
        _A("many rows", batch=7, tokens=41, width=8, heads=2, parameters="mixed"),
        _A("one token", batch=1, tokens=1, width=64, heads=6),
        _A("empty batch", batch=0),
    ),
    large=(
        _A("ViT-B, batch 8", batch=8, tokens=197, heads=12, parameters="mixed"),
        _A("50,432 rows", batch=256, tokens=197, heads=1, parameters="mixed"),
    ),
    quick=3,
    plain=plain,
    faults=(
        Fault("split_heads: keys and values swapped", "d_qkv", backward=_keys_and_values_swapped),
        Fault("split_heads: heads in another order", "d_qkv", backward=_heads_in_another_order),
        Fault("split_heads: strides not looked at", "d_qkv", backward=_read_as_if_contiguous),
        Fault("split_heads: last token missing from the sum", "d_bias", backward=faults.last_token_missing),
    ),
    views=True,
)
