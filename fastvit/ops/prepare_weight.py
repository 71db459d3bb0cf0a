"""The op `fastvit::prepare_weight`: the small step between a checkpoint's weight and what a kernel multiplies with.

The convolution's weight becomes a matrix in the compute dtype, with the normalisation's scale folded in; the mean
goes into the bias, which is corrected from the *rounded* matrix (from the unrounded one the result would be less
exact than eager autocast). Backends call their own version inside `patch_embed`; this op shows the step by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.backend import count_launch
from fastvit.cpu.prepare_weight import prepare_weight as prepare
from fastvit.ops import registry


def _run(
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    is_uint8: bool,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    count_launch("prepare_weight", "cpu")
    with registry.without_autocast(weight.device.type):
        return prepare(weight, bias, mean, std, is_uint8, compute_dtype)


def _fake(
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    is_uint8: bool,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dim = weight.shape[0]
    return (
        weight.new_empty((dim, weight[0].numel()), dtype=compute_dtype),
        weight.new_empty(dim, dtype=torch.float32),
    )


prepare_weight = registry.define(
    "prepare_weight(Tensor weight, Tensor? bias, float[]? mean, float[]? std, bool is_uint8, "
    "ScalarType compute_dtype) -> (Tensor, Tensor)",
    _run,
    _fake,
)
