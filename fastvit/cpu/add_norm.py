"""`add_norm` by PyTorch's own ops, on any device: on a CPU the fast ones, elsewhere for what has no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def forward(
    residual: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (size 0 without a branch), its norm, and [2, rows] float32: mean and 1/deviation of every row.

    Arguments as in `fastvit.functional.add_norm`, already checked.
    """
    total = residual if branch is None else _add(residual, branch, bias, scale, keep, sum_dtype)
    value, gain, offset = total.float(), weight.float(), None if norm_bias is None else norm_bias.float()
    if rms:
        mean = value.new_zeros(value.shape[:-1])
        deviation = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
        normed = value * deviation * gain
        if offset is not None:
            normed = normed + offset
    else:
        normed, mean, deviation = torch.native_layer_norm(value, value.shape[-1:], gain, offset, eps)
    statistics = torch.stack([mean.flatten(), deviation.flatten()])
    return residual.new_empty(0, dtype=sum_dtype) if branch is None else total, normed.to(dtype), statistics


def _add(
    residual: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Made in float32, rounded once."""
    if bias is None and scale is None and keep is None and residual.dtype == branch.dtype == dtype:
        return residual + branch  # half precision too is added in float32
    change = branch.float() if bias is None else branch.float() + bias.float()
    factor = _factor(scale, keep, residual.dim())
    if factor is None:
        return (residual.float() + change).to(dtype)
    return torch.addcmul(residual.float(), change, factor).to(dtype)


def _factor(scale: Tensor | None, keep: Tensor | None, dims: int) -> Tensor | None:
    """What the branch is multiplied by, [D] or [B, 1, ..., D or 1] float32."""
    by_sample = None if keep is None else keep.view(-1, *(1,) * (dims - 1))
    if scale is None or by_sample is None:
        return by_sample if scale is None else scale.float()
    return scale.float() * by_sample


def is_apart(residual_dtype: torch.dtype, branch: Tensor, scale: Tensor | None, keep: Tensor | None) -> bool:
    """Whether the branch's gradient is not the residual's itself."""
    return scale is not None or keep is not None or branch.dtype != residual_dtype


def backward(
    total: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    statistics: Tensor,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual and branch (size 0 where it is the residual's, or there is none), and [vectors, D] float32
    of the vectors that are there: weight, norm_bias, bias, scale. `branch` is read with a scale alone."""
    d_value, d_weight, d_norm_bias = _norm_backward(total, d_normed, weight, statistics, rms)
    if d_total is not None:
        d_value = d_value + d_total
    d_residual = d_value.to(residual_dtype)
    sums = [d_weight] if norm_bias is None else [d_weight, d_norm_bias]
    if branch is None or not is_apart(residual_dtype, branch, scale, keep):
        sums += [] if bias is None else [_over_rows(d_value)]
        return d_residual, total.new_empty(0, dtype=residual_dtype), torch.stack(sums)
    if keep is not None:
        d_value = d_value * keep.view(-1, *(1,) * (total.dim() - 1))
    d_branch = d_value if scale is None else d_value * scale.float()
    sums += [] if bias is None else [_over_rows(d_branch)]
    if scale is not None:
        change = branch.float() if bias is None else branch.float() + bias.float()
        sums.append(_over_rows(d_value * change))
    return d_residual, d_branch.to(branch.dtype), torch.stack(sums)


def _norm_backward(
    total: Tensor, d_normed: Tensor, weight: Tensor, statistics: Tensor, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, the weight and the norm's bias, in float32."""
    value, d_normed, weight = total.float(), d_normed.float(), weight.float()
    mean, deviation = statistics.view(2, *total.shape[:-1], 1)
    if not rms and not statistics.requires_grad:
        function: Any = torch.ops.aten.native_layer_norm_backward.default
        mask = [True, True, True]
        return function(d_normed, value, weight.shape, mean, deviation, weight, weight, mask)
    x_hat = (value - mean) * deviation
    d_hat = d_normed * weight
    d_value = d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True)
    if not rms:
        d_value = d_value - d_hat.mean(-1, keepdim=True)
    return d_value * deviation, _over_rows(d_normed * x_hat), _over_rows(d_normed)


def _over_rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0)


def followed(given: Sequence[Any], rms: bool) -> list[Any]:
    """The first arguments of `backward`, with statistics that follow the sum: of the same values, but with the
    derivatives of what they were computed as."""
    value, statistics = given[0].float(), given[-1]
    mean, deviation = statistics.view(2, *value.shape[:-1], 1)
    follows = value.mean(-1, keepdim=True)
    new_mean = mean if rms else follows + (mean - follows).detach()
    spread = (value - new_mean).square().mean(-1, keepdim=True)
    new_deviation = torch.rsqrt(spread + (deviation**-2 - spread).detach())  # the difference is eps
    return [*given[:-1], torch.stack([new_mean, new_deviation]).view_as(statistics)]
