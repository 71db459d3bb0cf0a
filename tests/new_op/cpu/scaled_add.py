"""The backend `cpu` of the toy op."""

from __future__ import annotations

from torch import Tensor


def forward(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """a + factor·b and a − factor·b."""
    return a + factor * b, a - factor * b


def backward(d_sum: Tensor, d_difference: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return d_sum + d_difference, factor * (d_sum - d_difference)
