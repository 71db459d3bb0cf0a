"""`add_position` in C++ for the processor; the same arguments as every backend's."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N, D] → [B, R+N, D]; arguments as in `fastvit.functional.add_position`, already checked."""
    return torch.ops.fastvit_native.add_position_cuda(tokens, pos_embed, prefix, dtype)


def backward(grad: Tensor) -> Tensor:
    """[B, T, D] → [T, D] float32: the gradient of every row of the table, summed over the batch."""
    return torch.ops.fastvit_native.add_position_backward_cuda(grad)
