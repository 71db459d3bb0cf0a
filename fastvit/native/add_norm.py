"""`add_norm` in C++ for the processor; the same arguments as every backend's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (size 0 without a branch), its norm, and [2, rows] float32: mean and 1/deviation of every row.

    Arguments as in `fastvit.functional.add_norm`, already checked, in the order of the op.
    """
    return torch.ops.fastvit_native.add_norm_cuda(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual and branch (size 0 where it is the residual's, or there is none), and [vectors, D] float32
    of the vectors that are there: weight, norm_bias, bias, scale."""
    return torch.ops.fastvit_native.add_norm_backward_cuda(*arguments)
