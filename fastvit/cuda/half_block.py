"""The norm of half a block and the products around it by the C++/CUDA extension, in one call each way.

The functions are those of `fastvit.half_block` that go op by op, with the same arguments and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastvit.backend import count_launch
from fastvit.cpu.bias_act import FUNCTIONS
from fastvit.cuda.call import call

_FUNCTIONS = {"": (-1, 0.0, 0.0), **FUNCTIONS}  # none: a product alone


def forward(settings: Any, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The fields of `fastvit.half_block.Made`."""
    (eps, rms, sum_dtype, dtype, _), act, *_ = settings
    _count("", settings)
    with torch._C._DisableAutocast():
        made = call(torch.ops.fastvit.half_block_cuda, *tensors, eps, rms, sum_dtype, dtype, *_FUNCTIONS[act])
    if not act:
        made = [*made[:5], None, None, None, *made[5:]]
    return made if len(made) == 10 else [*made, None, None]


def backward(
    d_total: Tensor | None,
    d_results: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    settings: Any,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors of `add_norm`, and of before, first, act_bias and second."""
    (_, rms, *_), act, *_ = settings
    _count("_backward", settings)
    total, branch, *others = kept
    bias, scale, _, _, norm_bias, _, before, _, act_bias, second, *_ = others
    residual_dtype, branch_dtype = dtypes
    if branch is None and branch_dtype is not None:
        assert total is not None
        branch = total.new_empty(0, dtype=branch_dtype)
    needs = wanted[7], wanted[8], wanted[10]
    d_q, d_k, d_v = d_results if settings.heads else (*d_results, None, None)
    arguments = (d_total, d_q, d_k, d_v, total, branch, *others, rms, residual_dtype, *_FUNCTIONS[act], *needs)
    with torch._C._DisableAutocast():
        found = call(torch.ops.fastvit.half_block_backward_cuda, *arguments)
    given = (branch, bias, scale, norm_bias, before, act_bias, second)
    places = _places(*[tensor is not None for tensor in given])
    return tuple([found[place] if place >= 0 and need else None for place, need in zip(places, wanted, strict=False)])


@lru_cache
def _places(
    branch: bool, bias: bool, scale: bool, norm_bias: bool, before: bool, act_bias: bool, second: bool
) -> tuple[int, ...]:
    """Where the library has the gradient of each tensor, -1 for those that have none."""
    has = {
        "residual": True,
        "branch": branch,
        "weight": True,
        "norm_bias": norm_bias,
        "bias": bias,
        "scale": scale,
        "before": before,
        "first": True,
        "act_bias": act_bias,
        "second": second,
    }
    order = [name for name, is_there in has.items() if is_there]
    slots = (
        "residual",
        "branch",
        "bias",
        "scale",
        "keep",
        "weight",
        "norm_bias",
        "before",
        "first",
        "act_bias",
        "second",
    )
    return tuple(order.index(name) if name in order else -1 for name in slots)


def _count(way: str, settings: Any) -> None:
    """The ops that are in it have run."""
    count_launch(f"add_norm{way}", "cuda")
    if settings.act:
        count_launch(f"bias_act{way}", "cuda")
    if settings.heads and way:
        count_launch(f"split_heads{way}", "cuda")
