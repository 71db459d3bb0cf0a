"""`patch_embed_packed` by the C++/CUDA extension: what the library's ops need beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.backend import multiplies_at_tf32
from fastvit.cpu import patch_embed_packed as plain
from fastvit.cuda.call import call
from fastvit.cuda.patch_embed import Normalisation, constants_of
from fastvit.kernels.packed_images import read_images
from fastvit.transfer import to_device


def forward(*arguments: Any) -> Tensor:
    """[C, H_i, W_i] each → [Σ R+N_i, D]; arguments as of the op, already checked."""
    return run_forward(torch.ops.fastvit.patch_embed_packed_cuda, multiplies_at_tf32, *arguments)


def backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The gradients of images, weight, bias, and prefix and position rows; none of the images, or of size 0, where not
    needed. That of the images, which few train, is plain PyTorch's."""
    return run_backward(torch.ops.fastvit.patch_embed_packed_backward_cuda, multiplies_at_tf32, *arguments)


def run_forward(
    op: Any,
    multiplies_at_tf32: Callable[[torch.dtype], bool] | None,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    images: Sequence[Tensor],
    starts: Sequence[int],
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """`forward` through `op`: the library's, the emulated one, or the processor's, which has no TF32 and no table."""
    if not images:
        return weight.new_empty((0, weight.shape[0]), dtype=dtype)
    constants = constants_of(mean, std, weight.shape[1], images[0], compute_dtype)
    given = weight, bias, pos_embed, prefix, *_described(images, starts, weight, multiplies_at_tf32 is not None)
    tf32 = multiplies_at_tf32 is not None and multiplies_at_tf32(compute_dtype)
    return call(op, *given, constants, compute_dtype, dtype, tf32)


def run_backward(
    op: Any,
    multiplies_at_tf32: Callable[[torch.dtype], bool] | None,
    grad: Tensor,
    weight: Tensor,
    images: Sequence[Tensor],
    starts: Sequence[int],
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    table_rows: int,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """`backward` through `op`, likewise."""
    need_images, *rest = needs
    given = grad, weight, images, starts, mean, std, compute_dtype, prefix_rows, table_rows
    if not images:
        return plain.backward(*given, needs)
    d_images: list[Tensor] = []
    if need_images:
        d_images = plain.backward(*given, (True, False, False, False))[0]
    # The processor reads the gradient as it is.
    product_grad = grad.to(compute_dtype) if rest[0] and multiplies_at_tf32 is not None else grad
    constants = constants_of(mean, std, weight.shape[1], images[0], compute_dtype)
    described = _described(images, starts, weight, multiplies_at_tf32 is not None)
    tf32 = multiplies_at_tf32 is not None and multiplies_at_tf32(compute_dtype)
    settings = constants, compute_dtype, prefix_rows, table_rows, tf32, mean is not None, rest
    d_weight, d_bias, d_rows = call(op, grad, product_grad, weight, *described, *settings)
    return d_images, d_weight, d_bias, d_rows[: prefix_rows + table_rows]


def _described(
    images: Sequence[Tensor], starts: Sequence[int], weight: Tensor, has_table: bool
) -> tuple[list[Tensor], list[int], Tensor | None]:
    """Images as kernels can read them, starts, and the table by which a GPU's find them."""
    if not has_table:
        return list(images), list(starts), None
    found = read_images(images, starts, (weight.shape[2], weight.shape[3]))
    table = to_device(found.table.flatten(), torch.int64, weight.device).view(found.table.shape)
    return found.tensors, list(starts), table
