"""`split_heads` in C++ for the processor: its backward, as forward is made of views."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.cpu.split_heads import forward

__all__ = ["backward", "forward"]


def backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Three of [B, H, T, D/H] → [B, T, 3D], and its sums over batch and tokens, float32 (size 0 without a bias)."""
    return torch.ops.fastvit_native.split_heads_backward_cuda(d_q, d_k, d_v, has_bias)
