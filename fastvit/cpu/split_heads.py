"""`split_heads` by PyTorch's own ops, on any device: on a CPU the fast ones, elsewhere for what has no kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3D] → q, k, v [B, H, T, D/H], views of it."""
    batch, tokens, width = qkv.shape
    heads = qkv.view(batch, tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Three of [B, H, T, D/H] → [B, T, 3D], and its sums over batch and tokens, float32 (size 0 without a bias)."""
    batch, heads, tokens, width = d_q.shape
    d_qkv = d_q.new_empty(batch, tokens, 3 * heads * width)
    for packed, gradient in zip(forward(d_qkv, heads), (d_q, d_k, d_v), strict=True):
        packed.copy_(gradient)
    sums = d_qkv.flatten(0, 1).sum(0, dtype=torch.float32) if has_bias else d_q.new_empty(0, dtype=torch.float32)
    return d_qkv, sums
