"""`bias_act` by the emulated kernels; the same arguments as every backend's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvit.cuda.bias_act import run_backward, run_forward
from fastvit.emulated import ops


def forward(*arguments: Any) -> Tensor:
    """As `fastvit.cuda.bias_act.forward`, on the CPU."""
    return run_forward(ops.bias_act, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `fastvit.cuda.bias_act.backward`, on the CPU."""
    return run_backward(ops.bias_act_backward, *arguments)
