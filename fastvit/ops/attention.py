"""The ops `fastvit::attention` and `fastvit::attention_backward`, of a processor: on a GPU it is PyTorch's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import reference
from fastvit.cpu import attention as formulas
from fastvit.ops import registry


class Arguments(NamedTuple):
    """What `fastvit.functional.attention` was given, checked and settled."""

    qkv: Tensor  # [B, T, 3D]
    bias: Tensor | None  # [3D], part of qkv already, for its gradient alone
    num_heads: int
    scale: float
    backend: str


def _fake(call: Arguments) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D], and the logarithm [B, H, T] of the sum of exponentials of every row of scores."""
    batch, tokens, width = call.qkv.shape
    return (
        call.qkv.new_empty((batch, tokens, width // 3)),
        call.qkv.new_empty((batch, call.num_heads, tokens), dtype=torch.float32),
    )


def _plain(call: Arguments) -> tuple[Tensor, Tensor]:
    out = reference.attention(call.qkv, call.bias, call.num_heads, scale=call.scale)
    return out, call.qkv.new_empty(0, dtype=torch.float32)


def _flops(call: Any) -> int:
    batch, tokens, width = call.qkv
    return 4 * batch * tokens * tokens * (width // 3)


attention = registry.define("attention", Arguments, "(Tensor, Tensor)", _fake, plain=_plain, flops=_flops)


class BackwardArguments(NamedTuple):
    """The gradient of the tokens, what the forward was given and what it gave."""

    grad: Tensor  # [B, T, D]
    qkv: Tensor  # [B, T, 3D]
    bias: Tensor | None  # [3D], not read; None where its gradient is not wanted
    out: Tensor  # [B, T, D]
    logsums: Tensor  # [B, H, T]
    num_heads: int
    scale: float
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, Tensor]:
    """Of qkv, and its float32 sums over batch and tokens (size 0 without a bias)."""
    sums = 0 if call.bias is None else call.qkv.shape[-1]
    return torch.empty_like(call.qkv), call.qkv.new_empty((sums,), dtype=torch.float32)


def _backward_flops(call: Any) -> int:
    batch, tokens, width = call.qkv
    return 10 * batch * tokens * tokens * (width // 3)


attention_backward = registry.define(
    "attention_backward", BackwardArguments, "(Tensor, Tensor)", _backward_fake, flops=_backward_flops
)


def _save(ctx: Any, call: Arguments, results: tuple[Tensor, Tensor]) -> None:
    out, logsums = results
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsums)
    ctx.save_for_backward(call.qkv, call.bias, out, logsums)
    ctx.rest = call.num_heads, call.scale, call.backend


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None
    qkv, bias, out, logsums = ctx.saved_tensors
    bias = bias if ctx.needs_input_grad[1] else None
    d_qkv, sums = attention_backward(grad, qkv, bias, out, logsums, *ctx.rest)
    return d_qkv, None if bias is None else sums.to(bias.dtype)


registry.differentiate(attention, Arguments, _save, _gradients)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.grad, call.qkv, call.bias)
    ctx.rest = call.num_heads, call.scale


def _second_gradients(ctx: Any, *changes: Tensor | None) -> tuple[Tensor | None, ...]:
    # What the forward gave is a function of qkv, by which it counts.
    return registry.derivatives(ctx, lambda *given: formulas.gradients(*given, *ctx.rest), changes)


registry.differentiate(attention_backward, BackwardArguments, _save_backward, _second_gradients)
