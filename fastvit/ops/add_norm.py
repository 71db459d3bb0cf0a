"""The ops `fastvit::add_norm` and `fastvit::add_norm_backward`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import reference
from fastvit.cpu import add_norm as formulas
from fastvit.ops import registry


class Arguments(NamedTuple):
    """What `fastvit.functional.add_norm` was given, checked and settled."""

    residual: Tensor  # [..., D]
    branch: Tensor | None  # [..., D]
    bias: Tensor | None  # [D], like the next
    scale: Tensor | None
    keep: Tensor | None  # [B] float32
    weight: Tensor  # [D], like the next
    norm_bias: Tensor | None
    eps: float
    rms: bool
    sum_dtype: torch.dtype
    dtype: torch.dtype
    backend: str


def _fake(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (size 0 without a branch: it is the residual), its norm, and mean and 1/deviation of every row."""
    residual = call.residual
    return (
        residual.new_empty(0 if call.branch is None else residual.shape, dtype=call.sum_dtype),
        residual.new_empty(residual.shape, dtype=call.dtype),
        residual.new_empty((2, math.prod(residual.shape[:-1])), dtype=torch.float32),
    )


def _plain(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """By the reference, whose derivative needs no statistics."""
    with registry.without_autocast(call.residual.device.type):
        total, normed = reference.add_norm(
            *call[:3],
            scale=call.scale,
            keep=call.keep,
            weight=call.weight,
            norm_bias=call.norm_bias,
            eps=call.eps,
            rms=call.rms,
            residual_dtype=call.sum_dtype,
            dtype=call.dtype,
        )
    nothing = normed.new_empty(0)
    return nothing if call.branch is None else total, normed, nothing


add_norm = registry.define("add_norm", Arguments, "(Tensor, Tensor, Tensor)", _fake, plain=_plain)


class BackwardArguments(NamedTuple):
    """What the gradients need of the arguments and of the results, and the gradients of these."""

    total: Tensor  # [..., D], the sum
    d_normed: Tensor  # [..., D]
    d_total: Tensor | None  # [..., D]
    branch: Tensor | None  # [..., D]; read for the scale's gradient alone
    bias: Tensor | None  # [D], like the next
    scale: Tensor | None
    keep: Tensor | None  # [B]
    weight: Tensor  # [D], like the next
    norm_bias: Tensor | None
    statistics: Tensor  # [2, rows]
    rms: bool
    residual_dtype: torch.dtype
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Of the residual; of the branch (size 0 where it is the residual's); and of the parameters, a row for each that
    is there: weight, norm_bias, bias, scale."""
    total, branch = call.total, call.branch
    is_apart = branch is not None and formulas.is_apart(call.residual_dtype, branch, call.scale, call.keep)
    vectors = (call.weight, call.norm_bias, call.bias, call.scale)
    return (
        total.new_empty(total.shape, dtype=call.residual_dtype),
        total.new_empty(
            total.shape if is_apart else (0,), dtype=call.residual_dtype if branch is None else branch.dtype
        ),
        total.new_empty((sum(vector is not None for vector in vectors), total.shape[-1]), dtype=torch.float32),
    )


add_norm_backward = registry.define("add_norm_backward", BackwardArguments, "(Tensor, Tensor, Tensor)", _backward_fake)


def _save(ctx: Any, call: Arguments, results: tuple[Tensor, ...]) -> None:
    total, _, statistics = results
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(
        call.residual if call.branch is None else total,
        # Of the branch nothing but its dtype is read without a scale: its memory is free for others by then.
        call.branch if call.scale is not None else None,
        *call[2:7],
        statistics,
    )
    ctx.branch_dtype = None if call.branch is None else call.branch.dtype
    ctx.rest = call.rms, call.residual.dtype, call.backend


def _gradients(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    total, branch, bias, scale, keep, weight, norm_bias, statistics = ctx.saved_tensors
    if d_total is not None and d_total.shape != total.shape:
        d_total = None  # of the sum of size 0
    if branch is None and ctx.branch_dtype is not None:
        branch = total.new_empty(0, dtype=ctx.branch_dtype)
    if d_normed is None:
        d_normed = torch.zeros_like(total)
    d_residual, d_branch, sums = add_norm_backward(
        total, d_normed, d_total, branch, bias, scale, keep, weight, norm_bias, statistics, *ctx.rest
    )
    vectors = (weight, norm_bias, bias, scale)
    rows = iter(sums.unbind())
    d_weight, d_norm_bias, d_bias, d_scale = (
        None if vector is None else next(rows).to(vector.dtype) for vector in vectors
    )
    if branch is None:
        d_branch = None
    elif not formulas.is_apart(d_residual.dtype, branch, scale, keep):
        d_branch = d_residual
    return d_residual, d_branch, d_bias, d_scale, None, d_weight, d_norm_bias


registry.differentiate(add_norm, Arguments, _save, _gradients)


class _NormAlone(torch.autograd.Function):
    """Without a branch, with the residual handed on: what comes back for it is added where the norm's gradient is made,
    in place of a pass of its own over both. An op of the library can't return what it was given."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        call = Arguments(*arguments)
        results = add_norm(*call)
        _save(ctx, call, results)
        return call.residual, results[1]

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> Any:
        found = _gradients(ctx, d_total, d_normed, None)
        return (*found, *(None,) * (len(Arguments._fields) - len(found)))


# Its own `apply` would look for transforms of torch.func, as `is_plain` has.
_apply_alone = super(torch.autograd.Function, _NormAlone).apply


def _norm_alone(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and arguments[0].requires_grad):
        return add_norm(*arguments)
    return (*_apply_alone(*arguments), None)


def norm_of(call: Arguments, trained: bool) -> tuple[Tensor, Tensor]:
    """The residual and its norm, by the shortest way: nothing looks at ops, and there is no branch."""
    if trained:
        residual, normed = _apply_alone(*call)
        return residual, normed
    return call.residual, add_norm.run(*call)[1]


norm_alone = dataclasses.replace(add_norm, call=_norm_alone, trained=_norm_alone)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:10])
    ctx.rest = call.rms, call.residual_dtype


def _second_gradients(ctx: Any, *changes: Tensor | None) -> tuple[Tensor | None, ...]:
    def formula(*given: Any) -> tuple[Tensor, ...]:
        return formulas.backward(*formulas.followed(given, ctx.rest[0]), *ctx.rest)

    return registry.derivatives(ctx, formula, changes)


registry.differentiate(add_norm_backward, BackwardArguments, _save_backward, _second_gradients)
