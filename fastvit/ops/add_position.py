"""The ops `fastvit::add_position` and `fastvit::add_position_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.backend import count_launch, implementation
from fastvit.ops import registry


def run_forward(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    count_launch("add_position", backend)
    forward, _ = implementation(backend, "add_position")
    with registry.without_autocast(tokens.device.type):
        return forward(tokens, pos_embed, prefix, dtype)


def _forward_fake(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    batch, patches, dim = tokens.shape
    rows = patches + (0 if prefix is None else prefix.shape[0])
    return tokens.new_empty((batch, rows, dim), dtype=dtype)


add_position = registry.define(
    "add_position(Tensor tokens, Tensor pos_embed, Tensor? prefix, ScalarType dtype, str backend) -> Tensor",
    run_forward,
    _forward_fake,
)


def _backward(grad: Tensor, backend: str) -> Tensor:
    count_launch("add_position_backward", backend)
    _, backward = implementation(backend, "add_position")
    with registry.without_autocast(grad.device.type):
        return backward(grad)


def _backward_fake(grad: Tensor, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[1:], dtype=torch.float32)


add_position_backward = registry.define(
    "add_position_backward(Tensor grad, str backend) -> Tensor", _backward, _backward_fake
)
registry.once_differentiable("add_position_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, pos_embed, prefix, _, backend = inputs
    ctx.backend = backend
    ctx.prefix_rows = 0 if prefix is None else prefix.shape[0]
    ctx.pos_rows = pos_embed.shape[0]
    ctx.tokens_dtype, ctx.pos_dtype = tokens.dtype, pos_embed.dtype
    ctx.prefix_dtype = None if prefix is None else prefix.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_tokens, need_pos, need_prefix = ctx.needs_input_grad[:3]
    d_tokens = d_pos = d_prefix = None
    if need_tokens:
        d_tokens = grad[:, ctx.prefix_rows :].to(ctx.tokens_dtype)  # a view where the dtype stays
    if need_pos or need_prefix:
        d_rows = add_position_backward(grad, ctx.backend)  # [R+N, D] float32
        skip = ctx.prefix_rows if ctx.pos_rows != d_rows.shape[0] else 0
        d_pos = d_rows[skip:].to(ctx.pos_dtype) if need_pos else None
        d_prefix = d_rows[: ctx.prefix_rows].to(ctx.prefix_dtype) if need_prefix else None
    return d_tokens, d_pos, d_prefix, None, None


torch.library.register_autograd("fastvit::add_position", _gradients, setup_context=_setup_context, lib=registry.LIBRARY)
