"""The ops `fastvit::patch_embed` and `fastvit::patch_embed_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit import checks
from fastvit.backend import count_launch, implementation
from fastvit.ops import registry


def run_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if keep is not None and keep.device.type == "cpu":
        checks.check_keep_range(keep, _patches(images, weight))
    count_launch("patch_embed", backend)
    forward, _ = implementation(backend, "patch_embed")
    with registry.without_autocast(images.device.type):
        return forward(images, weight, bias, pos_embed, prefix, mean, std, keep, compute_dtype, dtype)


def _forward_fake(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    rows = _patches(images, weight) if keep is None else keep.shape[1]
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    return images.new_empty((images.shape[0], prefix_rows + rows, weight.shape[0]), dtype=dtype)


def _patches(images: Tensor, weight: Tensor) -> int:
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


patch_embed = registry.define(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? keep, "
    "float[]? mean, float[]? std, ScalarType compute_dtype, ScalarType dtype, str backend) -> Tensor",
    run_forward,
    _forward_fake,
)


def _backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count_launch("patch_embed_backward", backend)
    _, backward = implementation(backend, "patch_embed")
    with registry.without_autocast(images.device.type):
        return backward(grad, images, weight, mean, std, keep, compute_dtype, prefix_rows, needs)


def _backward_fake(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dim = prefix_rows + _patches(images, weight), weight.shape[0]
    need_images, need_weight, need_bias, need_rows = needs
    return (
        torch.empty_like(images) if need_images else images.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        grad.new_empty(dim if need_bias else 0, dtype=torch.float32),
        grad.new_empty((rows, dim) if need_rows else (0,), dtype=torch.float32),
    )


patch_embed_backward = registry.define(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? keep, float[]? mean, float[]? std, "
    "ScalarType compute_dtype, SymInt prefix_rows, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
registry.once_differentiable("patch_embed_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, pos_embed, prefix, keep, mean, std, compute_dtype, _, backend = inputs
    # The images are saved as they came (uint8 stays uint8); patches are rebuilt in backward, never stored.
    ctx.save_for_backward(images, weight, keep)
    ctx.normalisation = mean, std
    ctx.compute_dtype = compute_dtype
    ctx.backend = backend
    ctx.prefix_rows = 0 if prefix is None else prefix.shape[0]
    ctx.pos_rows = 0 if pos_embed is None else pos_embed.shape[0]
    ctx.dtypes = tuple(None if table is None else table.dtype for table in (bias, pos_embed, prefix))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, keep = ctx.saved_tensors
    need_images, need_weight, need_bias, need_pos, need_prefix = ctx.needs_input_grad[:5]
    needs = (need_images, need_weight, need_bias, need_pos or need_prefix)
    d_images, d_weight, d_bias, d_rows = patch_embed_backward(
        grad, images, weight, keep, *ctx.normalisation, ctx.compute_dtype, ctx.prefix_rows, needs, ctx.backend
    )
    bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    # d_rows has a row for every prefix row and every patch position; a table that starts at the patches takes
    # the rows from there on.
    skip = ctx.prefix_rows if ctx.pos_rows != d_rows.shape[0] else 0
    return (
        d_images if need_images else None,
        d_weight if need_weight else None,
        d_bias.to(bias_dtype) if need_bias else None,
        d_rows[skip:].to(pos_dtype) if need_pos else None,
        d_rows[: ctx.prefix_rows].to(prefix_dtype) if need_prefix else None,
        *(None,) * 6,
    )


torch.library.register_autograd("fastvit::patch_embed", _gradients, setup_context=_setup_context, lib=registry.LIBRARY)
