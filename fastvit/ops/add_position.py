"""The ops `fastvit::add_position` and `fastvit::add_position_backward`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import registry


class Arguments(NamedTuple):
    """What `fastvit.functional.add_position` was given, checked and settled."""

    tokens: Tensor  # [B, N, D]
    pos_embed: Tensor  # [N, D] or [R+N, D]
    prefix: Tensor | None  # [R, D]
    dtype: torch.dtype
    backend: str


def _fake(call: Arguments) -> Tensor:
    batch, patches, dim = call.tokens.shape
    rows = patches + (0 if call.prefix is None else call.prefix.shape[0])
    return call.tokens.new_empty((batch, rows, dim), dtype=call.dtype)


def _plain(call: Arguments) -> Tensor:
    return reference.add_position(call.tokens, call.pos_embed, prefix=call.prefix, dtype=call.dtype)


add_position = registry.define("add_position", Arguments, "Tensor", _fake, plain=_plain)


class BackwardArguments(NamedTuple):
    """All that the gradients need."""

    grad: Tensor  # [B, R+N, D]
    backend: str


def _backward_fake(call: BackwardArguments) -> Tensor:
    return call.grad.new_empty(call.grad.shape[1:], dtype=torch.float32)


add_position_backward = registry.define("add_position_backward", BackwardArguments, "Tensor", _backward_fake)


def _save(ctx: Any, call: Arguments, _: Any) -> None:
    ctx.backend = call.backend
    ctx.prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    ctx.pos_rows = call.pos_embed.shape[0]
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in call[:3])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_tokens, need_pos, need_prefix = ctx.needs_input_grad[:3]
    tokens_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    d_tokens = d_pos = d_prefix = None
    if need_tokens:
        d_tokens = grad[:, ctx.prefix_rows :].to(tokens_dtype)  # a view where the dtype stays
    if need_pos or need_prefix:
        d_rows = add_position_backward(grad, ctx.backend)  # [R+N, D] float32
        skip = ctx.prefix_rows if ctx.pos_rows != d_rows.shape[0] else 0
        d_pos = d_rows[skip:].to(pos_dtype) if need_pos else None
        d_prefix = d_rows[: ctx.prefix_rows].to(prefix_dtype) if need_prefix else None
    return d_tokens, d_pos, d_prefix


registry.differentiate(add_position, Arguments, _save, _gradients)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.shape, ctx.dtype = call.grad.shape, call.grad.dtype


def _second_gradients(ctx: Any, change: Tensor) -> tuple[Tensor]:
    return (change.to(ctx.dtype).expand(ctx.shape),)  # it is a sum over the batch


registry.differentiate(add_position_backward, BackwardArguments, _save_backward, _second_gradients)
