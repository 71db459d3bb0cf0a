"""`patch_embed_packed` in C++ for the processor; the same arguments as every backend's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.cuda.patch_embed_packed import run_backward, run_forward
from fastvit.native.patch_embed import multiplied


def forward(*arguments: Any) -> Tensor:
    """[C, H_i, W_i] each → [Σ R+N_i, D]; arguments as of the op, already checked."""
    *given, compute_dtype, dtype = arguments
    settled = (*given, multiplied(compute_dtype), dtype)
    return run_forward(torch.ops.fastvit_native.patch_embed_packed_cuda, None, *settled)


def backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The gradients of images, weight, bias, and prefix and position rows; none of the images, or of size 0, where not
    needed. That of the images, which few train, is plain PyTorch's."""
    *given, compute_dtype, prefix_rows, table_rows, needs = arguments
    settled = (*given, multiplied(compute_dtype), prefix_rows, table_rows, needs)
    return run_backward(torch.ops.fastvit_native.patch_embed_packed_backward_cuda, None, *settled)
