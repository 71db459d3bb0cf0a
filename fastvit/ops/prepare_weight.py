"""The op `fastvit::prepare_weight`: the small step between a checkpoint's weight and what a kernel multiplies with.

The convolution's weight becomes a matrix in the compute dtype, with the normalisation's scale folded in; the mean
goes into the bias, which is corrected from the *rounded* matrix (from the unrounded one the result would be less
exact than eager autocast). Backends call their own version inside `patch_embed`; this op shows the step by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.backend import count_launch
from fastvit.cpu.prepare_weight import prepare_weight as prepare
from fastvit.ops import registry
from fastvit.ops.registry import Channels


class Arguments(NamedTuple):
    """Weight [D, C, P_h, P_w] and bias [D], and how pixels are normalised."""

    weight: Tensor
    bias: Tensor | None
    mean: Channels
    std: Channels
    is_uint8: bool
    compute_dtype: torch.dtype


def _run(call: Arguments) -> tuple[Tensor, Tensor]:
    count_launch("prepare_weight", "cpu")
    with registry.without_autocast(call.weight.device.type):
        return prepare(*call)


def _fake(call: Arguments) -> tuple[Tensor, Tensor]:
    weight, dim = call.weight, call.weight.shape[0]
    return (
        weight.new_empty((dim, weight[0].numel()), dtype=call.compute_dtype),
        weight.new_empty(dim, dtype=torch.float32),
    )


registry.define("prepare_weight", Arguments, "(Tensor, Tensor)", _fake, run=_run)
