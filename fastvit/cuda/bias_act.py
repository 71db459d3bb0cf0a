"""`bias_act` by the C++/CUDA extension, which knows the function by numbers; the same arguments as every backend's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.cpu.bias_act import FUNCTIONS
from fastvit.cuda.call import call


def forward(*arguments: Any) -> Tensor:
    """[..., F]; arguments as in `fastvit.functional.bias_act`, already checked, in the order of the op."""
    return run_forward(torch.ops.fastvit.bias_act_cuda, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and up (size 0 where there is none), and what the rows of both sum up to in float32, one behind
    the other (size 0 without a bias)."""
    return run_backward(torch.ops.fastvit.bias_act_backward_cuda, *arguments)


def run_forward(op: Any, *arguments: Any) -> Tensor:
    """`forward` through `op`: the library's, or the emulated one."""
    *tensors, act, gate_last, dtype = arguments
    return call(op, *tensors, *FUNCTIONS[act], gate_last, dtype)


def run_backward(op: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` through `op`: the library's, or the emulated one."""
    *tensors, act, gate_last = arguments
    return call(op, *tensors, *FUNCTIONS[act], gate_last)
