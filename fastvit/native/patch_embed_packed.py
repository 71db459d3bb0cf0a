"""`patch_embed_packed` in C++ for the processor; the same arguments as every backend's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cpu import patch_embed_packed as plain
from fastvit.cuda.call import call
from fastvit.cuda.patch_embed import Normalisation, constants_of
from fastvit.native.patch_embed import multiplied


def forward(
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    images: list[Tensor],
    starts: Sequence[int],
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[C, H_i, W_i] each → [Σ R+N_i, D]; arguments as of the op, already checked."""
    if not images:
        return weight.new_empty((0, weight.shape[0]), dtype=dtype)
    compute = multiplied(compute_dtype)
    constants = constants_of(mean, std, weight.shape[1], images[0], compute)
    op = torch.ops.fastvit_native.patch_embed_packed_cuda
    return call(op, weight, bias, pos_embed, prefix, images, list(starts), constants, compute, dtype)


def backward(
    grad: Tensor,
    weight: Tensor,
    images: list[Tensor],
    starts: Sequence[int],
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    table_rows: int,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The gradients of images, weight, bias, and prefix and position rows; none of the images, or of size 0, where not
    needed. That of the images, which few train, is plain PyTorch's."""
    need_images, *rest = needs
    given = weight, images, starts, mean, std
    if not images:
        return plain.backward(grad, *given, compute_dtype, prefix_rows, table_rows, needs)
    d_images: list[Tensor] = []
    if need_images:
        only_images = True, False, False, False
        d_images = plain.backward(grad, *given, compute_dtype, prefix_rows, table_rows, only_images)[0]
    compute = multiplied(compute_dtype)
    constants = constants_of(mean, std, weight.shape[1], images[0], compute)
    op = torch.ops.fastvit_native.patch_embed_packed_backward_cuda
    settings = constants, compute, prefix_rows, table_rows, rest
    d_weight, d_bias, d_rows = call(op, grad, weight, images, list(starts), *settings)
    return d_images, d_weight, d_bias, d_rows[: prefix_rows + table_rows]
