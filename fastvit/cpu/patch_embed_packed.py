"""`patch_embed_packed` on a CPU: the images one after another, with one weight that is prepared once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cpu import gemm
from fastvit.cpu.patch_embed import (
    Channels,
    Operands,
    add_weight_gradient,
    finish_weight_gradient,
    image_gradient,
    patch_count,
    patch_table,
)


def forward(
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    images: Sequence[Tensor],
    starts: Sequence[int],
    mean: Channels,
    std: Channels,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[C, H_i, W_i] each → [Σ R+N_i, D]; arguments as of the op, already checked."""
    counts = [patch_count(image[None], weight) for image in images]
    operands = _operands(images, sum(counts), weight, mean, std, compute_dtype, dtype)
    matrix, full_bias = operands.matrix(weight, bias)
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    tokens = weight.new_empty((sum(counts) + prefix_rows * len(counts), weight.shape[0]), dtype=dtype)
    for image, start, count, own in zip(images, starts, counts, _own(tokens, counts, prefix_rows), strict=True):
        if prefix is not None:
            own[:prefix_rows] = prefix
        positions = None if pos_embed is None else pos_embed[start : start + count]
        table = patch_table(full_bias, positions, count).to(operands.dtype)
        for _, rows in operands.chunks(image[None], weight, None):
            gemm.write_product(own[None, prefix_rows:], table, rows, matrix)
    return tokens


def backward(
    grad: Tensor,
    weight: Tensor,
    images: Sequence[Tensor],
    starts: Sequence[int],
    mean: Channels,
    std: Channels,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    table_rows: int,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of images, weight, bias, and prefix and position rows; none of the images, or of size 0, where not
    needed."""
    need_images, need_weight, need_bias, need_rows = needs
    counts = [patch_count(image[None], weight) for image in images]
    operands = _operands(images, sum(counts), weight, mean, std, compute_dtype, grad.dtype)
    rows = grad.new_zeros((prefix_rows + table_rows, weight.shape[0]), dtype=torch.float32)
    d_bias = grad.new_zeros(weight.shape[0], dtype=torch.float32)
    d_weight, d_images = None, []
    for image, start, count, own in zip(images, starts, counts, _own(grad, counts, prefix_rows), strict=True):
        patch_grad = own[None, prefix_rows:]
        if need_rows:
            rows[:prefix_rows] += own[:prefix_rows]
            if table_rows:
                rows[prefix_rows + start : prefix_rows + start + count] += patch_grad[0]
        if need_weight or need_bias:
            d_bias += patch_grad[0].sum(0, dtype=torch.float32)
        if need_weight:
            d_weight = add_weight_gradient(d_weight, patch_grad, image[None], weight, None, operands)
        if need_images:
            d_images.append(image_gradient(patch_grad, image[None], weight, std, None, operands.dtype)[0])
    nothing = grad.new_empty(0, dtype=torch.float32)
    return (
        d_images,
        finish_weight_gradient(d_weight, weight, d_bias, operands) if need_weight else weight.new_empty(0),
        d_bias if need_bias else nothing,
        rows if need_rows else nothing.clone(),
    )


def _operands(
    images: Sequence[Tensor],
    patches: int,
    weight: Tensor,
    mean: Channels,
    std: Channels,
    compute: torch.dtype,
    out: torch.dtype,
) -> Operands:
    pixels = images[0].dtype if images else weight.dtype
    return Operands.choose(pixels, patches, weight.shape[0], mean, std, compute, out)


def _own(tokens: Tensor, counts: Sequence[int], prefix_rows: int) -> Sequence[Tensor]:
    """The tokens [R+N_i, D] of each image."""
    return tokens.split([prefix_rows + count for count in counts])
