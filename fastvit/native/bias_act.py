"""`bias_act` in C++ for the processor, which knows the function by numbers; the same arguments as every backend's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.cuda.bias_act import run_backward, run_forward


def forward(*arguments: Any) -> Tensor:
    """[..., F]; arguments as in `fastvit.functional.bias_act`, already checked, in the order of the op."""
    return run_forward(torch.ops.fastvit_native.bias_act_cuda, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and up (size 0 where there is none), and what the rows of both sum up to in float32, one behind
    the other (size 0 without a bias)."""
    return run_backward(torch.ops.fastvit_native.bias_act_backward_cuda, *arguments)
