"""`attention` by PyTorch's own ops on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.cpu import split_heads


def forward(qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """[B, T, 3D] → tokens [B, T, D], and the logarithm [B, H, T] of the sum of exponentials of every row of scores.

    The bias is part of qkv already.
    """
    q, k, v = split_heads.forward(qkv, num_heads)
    if qkv.numel() == 0:
        return torch.empty_like(q).transpose(1, 2).flatten(2), q.new_empty(q.shape[:3], dtype=torch.float32)
    out, logsums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2), logsums.contiguous()


def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, logsums: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and its sums over batch and tokens, float32 (size 0 without a bias)."""
    has_bias = bias is not None
    heads = split_heads.forward(qkv, num_heads)
    if qkv.numel() == 0:
        return split_heads.backward(*heads, has_bias)
    grad, out = (tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in (grad, out))
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *heads, out, logsums, 0.0, False, scale=scale
    )
    return split_heads.backward(d_q, d_k, d_v, has_bias)


def gradients(grad: Tensor, qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """What `backward` gives, of ops that have derivatives themselves."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    of_both = qkv.to(wide) if bias is None else qkv.to(wide) + (bias - bias.detach())
    q, k, v = split_heads.forward(of_both, num_heads)
    d_out = grad.to(wide).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    weights = (q @ k.mT * scale).softmax(-1)
    d_weights = d_out @ v.mT
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
    of_heads = torch.stack((d_scores @ k, d_scores.mT @ q, weights.mT @ d_out), 2)  # [B, H, 3, T, D/H]
    d_qkv = of_heads.permute(0, 3, 2, 1, 4).flatten(2)
    sums = d_qkv.flatten()[:0] if bias is None else d_qkv.flatten(0, 1).sum(0)
    return d_qkv.to(qkv.dtype), sums
