"""`split_heads` by the C++/CUDA extension: its backward, as forward is made of views."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.cpu.split_heads import forward
from fastvit.cuda.call import call

__all__ = ["backward", "forward"]


def backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Three of [B, H, T, D/H] → [B, T, 3D], and its sums over batch and tokens, float32 (size 0 without a bias)."""
    return call(torch.ops.fastvit.split_heads_backward_cuda, d_q, d_k, d_v, has_bias)
