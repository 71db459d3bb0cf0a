"""`add_position` on a CPU: positions are added straight into the final sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N, D] → [B, R+N, D]; arguments as in `fastvit.functional.add_position`, already checked."""
    batch, patches, dim = tokens.shape
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    out = tokens.new_empty((batch, prefix_rows + patches, dim), dtype=dtype)
    skip = pos_embed.shape[0] - patches  # 0, or R where the prefix rows have positions of their own
    _add(tokens, pos_embed[skip:], out[:, prefix_rows:])
    if prefix is not None:
        write_prefix(out, prefix, pos_embed, patches)
    return out


def write_prefix(out: Tensor, prefix: Tensor, pos_embed: Tensor | None, patches: int) -> None:
    """The first R rows of every sample: prefix [R, D], with positions where `pos_embed` has more rows than patches."""
    skip = 0 if pos_embed is None else pos_embed.shape[0] - patches
    if pos_embed is not None and skip:
        prefix = prefix.float() + pos_embed[:skip].float()
    out[:, : prefix.shape[0]] = prefix


def backward(grad: Tensor) -> Tensor:
    """[B, T, D] → [T, D] float32: the gradient of every row of the table, summed over the batch."""
    return sum_over_batch(grad)


def sum_over_batch(grad: Tensor) -> Tensor:
    """Σ_b grad[b] in float32: [B, T, D] → [T, D]."""
    if grad.dtype == torch.float32:
        return grad.sum(0)
    # A sample at a time: a sum with another dtype would first convert the whole batch, out of the cache and back.
    total = grad.new_zeros(grad.shape[1:], dtype=torch.float32)
    for sample in grad:
        total += sample
    return total


def _add(tokens: Tensor, positions: Tensor, out: Tensor) -> None:
    """out = round(tokens + positions), the sum made in float32."""
    if tokens.dtype == positions.dtype == out.dtype:
        torch.add(tokens, positions, out=out)  # half precision too is added in float32 and rounded once
        return
    positions = positions.float()
    # A sample at a time and a step at a time: the float32 sum stays in the cache on its way to the final dtype, and
    # PyTorch's kernels for one dtype, or for a plain conversion, are far faster than those that mix dtypes.
    total = torch.empty_like(positions)
    for sample, result in zip(tokens, out, strict=True):
        result.copy_(total.copy_(sample).add_(positions))
