"""The op `fastvit::split_heads_backward`, and what it is the backward of: views, which a registered op can't return."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit.cpu import split_heads as formulas
from fastvit.ops import registry


class BackwardArguments(NamedTuple):
    """The gradients of q, k and v, and whether there is a bias whose gradient is their sum."""

    d_q: Tensor  # [B, H, T, D/H], like the next, of any strides
    d_k: Tensor
    d_v: Tensor
    has_bias: bool
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, Tensor]:
    """Of qkv, and its float32 sums over batch and tokens (size 0 without a bias)."""
    batch, heads, tokens, width = call.d_q.shape
    packed = 3 * heads * width
    return (
        call.d_q.new_empty((batch, tokens, packed)),
        call.d_q.new_empty((packed if call.has_bias else 0,), dtype=torch.float32),
    )


split_heads_backward = registry.define("split_heads_backward", BackwardArguments, "(Tensor, Tensor)", _backward_fake)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype, ctx.has_bias = call.d_q.shape, call.d_q.dtype, call.has_bias


def _second_gradients(ctx: Any, change: Tensor | None, of_sums: Tensor | None) -> tuple[Tensor | None, ...]:
    """The way there and back: what is packed is split, and what is summed is handed to every token."""
    batch, heads, tokens, _ = ctx.shape
    if of_sums is not None and ctx.has_bias:
        change = of_sums.expand(batch, tokens, -1) if change is None else change.float() + of_sums
    assert change is not None
    return formulas.forward(change.to(ctx.dtype).contiguous(), heads)


registry.differentiate(split_heads_backward, BackwardArguments, _save_backward, _second_gradients)


class SplitHeads(torch.autograd.Function):
    """[B, T, 3D], a bias that is part of it already (None without), H and a backend → q, k, v [B, H, T, D/H]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, num_heads: int, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.bias_dtype, ctx.backend = None if bias is None else bias.dtype, backend
        return formulas.forward(qkv, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        has_bias = ctx.needs_input_grad[1]
        d_qkv, sums = split_heads_backward(*grads, has_bias, ctx.backend)
        return d_qkv, sums.to(ctx.bias_dtype) if has_bias else None, None, None


# Its own `apply` would look for transforms of torch.func.
_apply = super(torch.autograd.Function, SplitHeads).apply


def split(qkv: Tensor, bias: Tensor | None, num_heads: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """`SplitHeads`, by a shorter way, where no transform is at work."""
    if not torch.is_grad_enabled():
        return formulas.forward(qkv, num_heads)
    q, k, v = _apply(qkv, bias, num_heads, backend)
    return q, k, v
