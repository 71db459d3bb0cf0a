"""`patch_embed` in C++ for the processor; the same arguments as every backend's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cpu import patch_embed as plain
from fastvit.cuda.patch_embed import run_backward, run_forward
from fastvit.native import instruction_set

Channels = Sequence[float] | None  # a value a channel


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Channels,
    std: Channels,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] → [B, R+N, D]; arguments as in `fastvit.functional.patch_embed`, already checked. An index in `keep`
    that is out of range gives a row of NaN."""
    op, compute = torch.ops.fastvit_native.patch_embed_cuda, multiplied(compute_dtype)
    return run_forward(op, _no_tf32, images, weight, bias, pos_embed, prefix, keep, mean, std, compute, dtype)


def backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mean: Channels,
    std: Channels,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of images, weight, bias and table rows, each where needs has it, else of size 0.

    That of the images, which few train, is plain PyTorch's.
    """
    need_images, *rest = needs
    given = images, weight, keep, mean, std
    d_images = images.new_empty(0)
    if need_images:
        only_images = True, False, False, False
        d_images = plain.backward(grad, *given, compute_dtype, prefix_rows, only_images)[0]
    op, compute = torch.ops.fastvit_native.patch_embed_backward_cuda, multiplied(compute_dtype)
    found = run_backward(op, _no_tf32, grad, *given, compute, prefix_rows, (False, *rest))
    return d_images, *found[1:]


def multiplied(compute_dtype: torch.dtype) -> torch.dtype:
    """What products are made of: bfloat16 where the processor multiplies it, else float32, which is faster there."""
    has_units = compute_dtype == torch.bfloat16 and instruction_set() == "avx512bf16"
    return torch.bfloat16 if has_units else torch.float32


def _no_tf32(_: torch.dtype) -> bool:
    return False
