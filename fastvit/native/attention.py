"""`attention` in C++ for the processor; the same arguments as every backend's."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_TOKENS = 640  # of csrc/torch/attention.cpp; more are faster by PyTorch's own, in parts


def forward(qkv: Tensor, bias: Tensor | None, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """[B, T, 3D] → tokens [B, T, D], and the logarithm [B, H, T] of the sum of exponentials of every row of scores.

    The bias is part of qkv already.
    """
    return torch.ops.fastvit_native.attention_cuda(qkv, num_heads, scale)


def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, logsums: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and its sums over batch and tokens, float32 (size 0 without a bias); `out` is not read."""
    has_bias = bias is not None
    return torch.ops.fastvit_native.attention_backward_cuda(grad, qkv, logsums, num_heads, scale, has_bias)
