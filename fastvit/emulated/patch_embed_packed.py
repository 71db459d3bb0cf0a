"""`patch_embed_packed` by the emulated kernels; the same arguments as every backend's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.cuda.patch_embed_packed import run_backward, run_forward
from fastvit.emulated import ops
from fastvit.emulated.call import current


def forward(*arguments: Any) -> Tensor:
    """As `fastvit.cuda.patch_embed_packed.forward`, on the CPU."""
    return run_forward(ops.patch_embed_packed, _multiplies_at_tf32, *arguments)


def backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """As `fastvit.cuda.patch_embed_packed.backward`, on the CPU."""
    return run_backward(ops.patch_embed_packed_backward, _multiplies_at_tf32, *arguments)


def _multiplies_at_tf32(_: torch.dtype) -> bool:
    return current().tf32
