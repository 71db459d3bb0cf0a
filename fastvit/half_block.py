"""The norm of half a block and the products around it as one node of autograd.

An op that is a node of its own keeps the host busy for longer than a launch takes: autograd makes it, and Python runs
its backward. Here one node runs the ops and products that follow one another in half a block, by the same functions
and with the same bits as one by one; those of the C++/CUDA extension in one call each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import ops
from fastvit.cpu.linear import linear as apply_linear
from fastvit.cpu.linear import weight_gradient
from fastvit.cpu.split_heads import forward as split_heads
from fastvit.cuda import half_block as extension
from fastvit.ops.add_norm import Arguments as NormArguments

__all__ = ["Products", "Settings", "run", "settle"]

_NORM, _ACT, _SPLIT_HEADS_BACKWARD = (ops.OPS[name] for name in ("add_norm", "bias_act", "split_heads_backward"))
_TENSORS = _NORM.tensors


class Products(NamedTuple):
    """What is made of the norm: a product, or two with an activation between them."""

    first: Tensor  # [F, D]
    bias: Tensor | None  # [F]; of a product alone it is added, and its gradient is left to who splits it into heads
    act: str = ""  # "": a product alone
    heads: int = 0  # of a product alone that is split into queries, keys and values
    second: Tensor | None = None  # [D'', F]
    last_bias: Tensor | None = None  # [D'']
    below: tuple[Tensor, ...] = ()  # of the form of `first`, which goes on in them: one product in place of several

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[n·F, D], of `first` and those below it, in the dtype of their product."""
        return _stacked(self.first, self.below, dtype)


def _stacked(first: Tensor, below: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if not below:
        return first.to(dtype)
    if torch.is_grad_enabled():
        return torch.cat([weight.to(dtype) for weight in (first, *below)])
    found = first.new_empty((1 + len(below), *first.shape), dtype=dtype)
    torch._foreach_copy_(found.unbind(), [first, *below])
    return found.flatten(0, 1)


class Settings(NamedTuple):
    """How a node is run, besides the tensors that it has gradients of."""

    norm: tuple[Any, ...]  # the arguments of `add_norm` that are no tensors
    act: str
    backend: str  # of `bias_act`, or `split_heads_backward`; "" for a product alone
    heads: int
    forward: Any
    backward: Any


def settle(
    norm: NormArguments, products: Products, before: Tensor | None, backend: str, autocast: torch.dtype | None
) -> Settings | None:
    """How these are run as one node; None where they are to be called one by one.

    Args:
        norm: the arguments of `fastvit::add_norm`, checked; its branch is as it is before the product with `before`.
        backend: of `fastvit::bias_act` or `fastvit::split_heads_backward`; "" for a product alone.
        autocast: its dtype where it is on.
    """
    weights = [weight for weight in (products.first, *products.below, products.second, before) if weight is not None]
    if "reference" in (norm.backend, backend):
        return None
    if torch.float64 in [weight.dtype for weight in weights] or any(weight.dim() != 2 for weight in weights):
        return None
    behind = weights if before is None else weights[:-1]
    is_of_one = norm.dtype == autocast if autocast else all(weight.dtype == norm.dtype for weight in behind)
    if not is_of_one:
        return None
    by_extension = norm.backend == "cuda" and backend in ("", "cuda")
    ways = (extension.forward, extension.backward) if by_extension else (_forward, _backward)
    return Settings(norm[_TENSORS:], products.act, backend, products.heads, *ways)


def run(
    settings: Settings, tensors: tuple[Tensor | None, ...], products: Products, trained: bool
) -> tuple[Tensor, ...]:
    """The sum, and what the products make of its norm.

    Args:
        tensors: residual, branch, bias, scale, keep, weight and norm_bias of `fastvit::add_norm`, and the weight
            [D, D'] that the branch is still to be multiplied by.
        products: what comes behind.
        trained: whether gradients are on.

    Returns:
        sum [..., D] (the residual itself without a branch) and result [..., F or D''], or queries, keys and values
        [B, H, T, D/H]. Differentiable, any number of times, in all tensors but `keep` and the bias of a product that
        is alone.
    """
    first, bias, act, heads, second, last_bias, below = products
    if trained:
        if bias is not None and not act and not heads:
            bias = bias.detach()
        return _apply(settings, *tensors, first, bias, second, last_bias, *below)
    total, _, _, result, *_ = settings.forward(settings, *tensors, first, bias, second, last_bias, below)
    residual, branch, *_ = tensors
    if branch is None:
        total = residual
    return (total, *split_heads(result, heads)) if heads else (total, result)


class Made(NamedTuple):
    """What the forward makes: the weights in the dtypes of their products, and what these give."""

    total: Tensor  # of size 0 without a branch
    normed: Tensor
    statistics: Tensor
    result: Tensor
    first: Tensor
    hidden: Tensor | None = None  # with an activation, like the next two
    active: Tensor | None = None
    second: Tensor | None = None
    branch: Tensor | None = None  # with a product before the norm, like the next
    before: Tensor | None = None


class Saved(NamedTuple):
    """What the backward is given of the forward."""

    total: Tensor  # with this and the next seven `add_norm` has its gradients
    branch: Tensor | None  # its values with a scale alone
    bias: Tensor | None
    scale: Tensor | None
    keep: Tensor | None
    weight: Tensor
    norm_bias: Tensor | None
    statistics: Tensor
    before: Tensor | None  # parameters
    first: Tensor
    act_bias: Tensor | None
    second: Tensor | None
    x: Tensor | None  # what `before` multiplied
    normed: Tensor
    cast_first: Tensor
    hidden: Tensor | None
    active: Tensor | None
    cast_second: Tensor | None
    cast_before: Tensor | None


_SAVED = len(Saved._fields)
_FIRST, _LAST_BIAS = _TENSORS + 1, _TENSORS + 4  # places among the tensors of a node


class _HalfBlock(torch.autograd.Function):
    """Settings, the tensors of `add_norm`, before, first, bias, second, last_bias, those below first → sum, and result
    or heads."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Any) -> tuple[Tensor, ...]:
        residual, x, bias, scale, keep, weight, norm_bias, before, first, act_bias, second, last_bias, *below = tensors
        total, normed, statistics, result, cast_first, hidden, active, cast_second, branch, cast_before = (
            settings.forward(settings, *tensors[: _LAST_BIAS + 1], below)
        )
        if before is None:
            branch = x
        if x is None:
            total = residual
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.dtypes = settings, (residual.dtype, None if branch is None else branch.dtype)
        ctx.save_for_backward(
            total,
            # Of the branch nothing but its dtype is read without a scale: its memory is free for others by then.
            None if scale is None else branch,
            bias,
            scale,
            keep,
            weight,
            norm_bias,
            statistics,
            before,
            first,
            act_bias if settings.act or settings.heads else None,
            second,
            None if before is None else x,
            normed,
            cast_first,
            hidden,
            active,
            cast_second,
            cast_before,
            last_bias,
            *below,
        )
        return (total, *split_heads(result, settings.heads)) if settings.heads else (total, result)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, *d_results: Any) -> Any:
        kept = ctx.saved_tensors
        saved, last_bias, below = kept[:_SAVED], kept[_SAVED], kept[_SAVED + 1 :]
        settings, (_, *wanted) = ctx.settings, ctx.needs_input_grad
        backward = settings.backward
        if torch.is_grad_enabled():
            saved, backward = _followed(Saved(*saved), below, settings), _backward
        if any([grad is None for grad in d_results]):
            d_results = _completed(d_results, Saved(*saved), settings.heads)
        if below:
            wanted[_FIRST] = any([wanted[_FIRST], *wanted[_LAST_BIAS + 1 :]])
        found = backward(d_total, d_results, saved, settings, ctx.dtypes, wanted)
        d_last_bias = None
        if wanted[_LAST_BIAS]:
            (d_result,) = d_results
            d_last_bias = d_result.reshape(-1, d_result.shape[-1]).sum(0).to(last_bias.dtype)
        if not below:
            return (None, *found, d_last_bias)
        *of_norm, d_first, d_act_bias, d_second = found
        parts = [None] * (1 + len(below)) if d_first is None else d_first.view(1 + len(below), -1, d_first.shape[1])
        d_first, *d_below = parts
        return (None, *of_norm, d_first, d_act_bias, d_second, d_last_bias, *d_below)


# Without a look at torch.func's transforms: `why_not` has taken it.
_apply = super(torch.autograd.Function, _HalfBlock).apply


def _completed(given: Sequence[Tensor | None], saved: Saved, heads: int) -> tuple[Tensor, ...]:
    """Zeros for gradients of results that nobody read."""
    like, features = saved.normed, (saved.cast_first if saved.second is None else saved.second).shape[0]
    zeros: Any = like.new_zeros((*saved.total.shape[:-1], features))
    zeros = split_heads(zeros, heads) if heads else (zeros,)
    return tuple(zero if grad is None else grad for grad, zero in zip(given, zeros, strict=True))


def _forward(settings: Settings, *tensors: Any) -> Made:
    """By the ops one by one."""
    *of_norm, before, first, act_bias, second, last_bias, below = tensors
    branch = of_norm[1]
    if before is not None:
        before = before.to(branch.dtype)
        branch = of_norm[1] = apply_linear(branch, before)
    total, normed, statistics = _NORM.run(*of_norm, *settings.norm)
    first = _stacked(first, below, normed.dtype)
    if second is None:
        result = apply_linear(normed, first, _cast(act_bias, normed))
        return Made(total, normed, statistics, result, first, branch=branch, before=before)
    hidden = apply_linear(normed, first)
    active = _ACT.run(hidden, act_bias, None, None, settings.act, None, hidden.dtype, settings.backend)
    second = second.to(normed.dtype)
    result = apply_linear(active, second, _cast(last_bias, normed))
    return Made(total, normed, statistics, result, first, hidden, active, second, branch, before)


def _backward(
    d_total: Tensor | None,
    d_results: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    settings: Settings,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors of `add_norm`, and of before, first, act_bias and second.

    Args:
        kept: the fields of :class:`Saved`.
        dtypes: of the residual and the branch.
        wanted: of which a gradient is.
    """
    saved = Saved(*kept)  # type: ignore[arg-type]
    d_act_bias, d_second = None, None
    if settings.heads:
        has_bias = saved.act_bias is not None
        d_hidden, sums = _SPLIT_HEADS_BACKWARD(*d_results, has_bias, settings.backend)
        d_act_bias = sums.to(saved.act_bias.dtype) if saved.act_bias is not None else None
    else:
        (d_hidden,) = d_results
    if saved.second is not None and saved.cast_second is not None and saved.active is not None:
        d_second = weight_gradient(d_hidden, saved.active).to(saved.second.dtype) if wanted[10] else None
        d_active = apply_linear(d_hidden, saved.cast_second.t())
        act = _Kept((saved.hidden, saved.act_bias, None, None), (settings.act, None, settings.backend))
        d_hidden, d_act_bias, *_ = _ACT.gradients(act, d_active)
    d_first = weight_gradient(d_hidden, saved.normed).to(saved.first.dtype) if wanted[8] else None
    norm = _Kept(saved[:8], (settings.norm[1], dtypes[0], settings.norm[-1]), dtypes[1])
    of_norm = _NORM.gradients(norm, d_total, apply_linear(d_hidden, saved.cast_first.t()), None)
    d_before = None
    if saved.before is not None and saved.cast_before is not None and saved.x is not None:
        d_residual, d_branch, *others = of_norm
        d_before = weight_gradient(d_branch, saved.x).to(saved.before.dtype) if wanted[7] else None
        of_norm = (d_residual, apply_linear(d_branch, saved.cast_before.t()), *others)
    return (*of_norm, d_before, d_first, d_act_bias, d_second)


class _Kept(NamedTuple):
    """A context, as the gradients of an op read it."""

    saved_tensors: tuple[Tensor | None, ...]
    rest: tuple[Any, ...]
    branch_dtype: torch.dtype | None = None


def _followed(saved: Saved, below: Sequence[Tensor], settings: Settings) -> Saved:
    """With what the forward made of its arguments and of the sum made again, for derivatives of the gradients."""
    eps, rms, _, dtype, backend = settings.norm
    given = (saved.total, None, None, None, None, saved.weight, saved.norm_bias, eps, rms, saved.total.dtype, dtype)
    normed, first = _NORM(*given, backend)[1], _stacked(saved.first, below, dtype)
    saved = saved._replace(normed=normed, cast_first=first)
    if saved.second is not None:
        hidden = apply_linear(normed, first)
        active = _ACT(hidden, saved.act_bias, None, None, settings.act, None, dtype, settings.backend)
        saved = saved._replace(hidden=hidden, active=active, cast_second=saved.second.to(dtype))
    if saved.before is not None and saved.x is not None:
        before = saved.before.to(saved.x.dtype)
        branch = None if saved.scale is None else apply_linear(saved.x, before)
        saved = saved._replace(branch=branch, cast_before=before)
    return saved


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)
