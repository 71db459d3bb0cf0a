"""The ops `fastvit::patch_embed` and `fastvit::patch_embed_backward`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastvit import checks, reference
from fastvit.ops import registry
from fastvit.ops.decompositions import normalised
from fastvit.ops.registry import Channels, Needs

Images = TypeVar("Images", Tensor, list[Tensor])


class Arguments(NamedTuple):
    """What `fastvit.functional.patch_embed` was given, checked and settled."""

    images: Tensor  # [B, C, H, W]
    weight: Tensor  # [D, C, P_h, P_w]
    bias: Tensor | None  # [D]
    pos_embed: Tensor | None  # [N, D] or [R+N, D]
    prefix: Tensor | None  # [R, D]
    keep: Tensor | None  # [B, N_keep]
    mean: Channels
    std: Channels
    compute_dtype: torch.dtype
    dtype: torch.dtype
    backend: str


def _patches(images: Tensor, weight: Tensor) -> int:
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


def _check(images: Tensor, weight: Tensor, _b: Any, _p: Any, _r: Any, keep: Tensor | None, *_: Any) -> None:
    if keep is not None and keep.device.type == "cpu":
        checks.check_keep_range(keep, _patches(images, weight))


def _fake(call: Arguments) -> Tensor:
    images, weight = call.images, call.weight
    rows = _patches(images, weight) if call.keep is None else call.keep.shape[1]
    prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    return images.new_empty((images.shape[0], prefix_rows + rows, weight.shape[0]), dtype=call.dtype)


def _plain(call: Arguments) -> Tensor:
    """By the reference, at the precision asked for."""
    compute_dtype = call.compute_dtype
    with registry.without_autocast(call.images.device.type):
        return reference.patch_embed(
            # The reference would copy mean and std from the host, which no graph can hold.
            normalised(call.images, call.mean, call.std, compute_dtype),
            call.weight.to(compute_dtype),
            None if call.bias is None else call.bias.to(compute_dtype),
            pos_embed=call.pos_embed,
            prefix=call.prefix,
            keep=call.keep,
            dtype=call.dtype,
        )


def _product(images: Any, weight: Any, keep: Any) -> int:
    """From shapes: a multiplication and an addition for every value of the weight and every patch."""
    patches = images[0] * (images[2] // weight[2]) * (images[3] // weight[3]) if keep is None else math.prod(keep)
    return 2 * patches * math.prod(weight)


def _flops(call: Any) -> int:
    return _product(call.images, call.weight, call.keep)


patch_embed = registry.define("patch_embed", Arguments, "Tensor", _fake, check=_check, plain=_plain, flops=_flops)


class BackwardArguments(NamedTuple):
    """What the gradients need of the arguments, and the gradient of the tokens."""

    grad: Tensor  # [B, R+N, D] or [B, R+N_keep, D]
    images: Tensor
    weight: Tensor
    keep: Tensor | None
    mean: Channels
    std: Channels
    compute_dtype: torch.dtype
    prefix_rows: int
    needs: Needs  # of images, weight, bias, and table rows
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, images, weight = call.grad, call.images, call.weight
    rows, dim = call.prefix_rows + _patches(images, weight), weight.shape[0]
    need_images, need_weight, need_bias, need_rows = call.needs
    return (
        torch.empty_like(images) if need_images else images.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        grad.new_empty(dim if need_bias else 0, dtype=torch.float32),
        grad.new_empty((rows, dim) if need_rows else (0,), dtype=torch.float32),
    )


def _backward_flops(call: Any) -> int:
    need_images, need_weight, *_ = call.needs
    return _product(call.images, call.weight, call.keep) * (need_images + need_weight)


patch_embed_backward = registry.define(
    "patch_embed_backward",
    BackwardArguments,
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    flops=_backward_flops,
)


def _save(ctx: Any, call: Arguments, _: Any) -> None:
    # The images are saved as they came (uint8 stays uint8); patches are rebuilt in backward, never stored.
    ctx.save_for_backward(call.images, call.weight, call.keep)
    ctx.prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    ctx.settings = call.mean, call.std, call.compute_dtype, ctx.prefix_rows
    ctx.backend = call.backend
    ctx.pos_rows = 0 if call.pos_embed is None else call.pos_embed.shape[0]
    ctx.dtypes = tuple(None if table is None else table.dtype for table in (call.bias, call.pos_embed, call.prefix))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_images, need_weight, need_bias, need_pos, need_prefix = ctx.needs_input_grad[:5]
    needs = (need_images, need_weight, need_bias, need_pos or need_prefix)
    d_images, d_weight, d_bias, d_rows = patch_embed_backward(
        grad, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend
    )
    bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    # d_rows has a row for every prefix row and every patch position; a table that starts at the patches takes
    # the rows from there on.
    skip = ctx.prefix_rows if ctx.pos_rows != d_rows.shape[0] else 0
    return (
        d_images if need_images else None,
        d_weight if need_weight else None,
        d_bias.to(bias_dtype) if need_bias else None,
        d_rows[skip:].to(pos_dtype) if need_pos else None,
        d_rows[: ctx.prefix_rows].to(prefix_dtype) if need_prefix else None,
    )


registry.differentiate(patch_embed, Arguments, _save, _gradients)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.grad, call.images, call.weight, call.keep)
    ctx.rest = call[4:]


def second_gradients(
    needs: Sequence[bool],
    images: Images,
    weight: Tensor,
    mean: Channels,
    of_images: Images | None,
    of_others: Sequence[Tensor | None],
    tokens: Callable[[Images, Tensor, Tensor | None, Tensor | None, Channels], Tensor],
    gradients: Callable[[Images, Tensor, Channels, Needs], Sequence[Any]],
) -> tuple[Tensor | None, Images | None, Tensor | None]:
    """Of what a backward op returns, in grad, images and weight; float32 for grad.

    All but the images' mean is linear: tokens in weight, bias and rows, and gradients in grad, each for fixed images.
    So the derivatives are the two ops again, with the given change in the place of what it changes; and they have
    derivatives themselves, of any order.

    Args:
        needs: of grad, images and weight, whether they have a gradient.
        of_images, of_others: the gradients of those of images; and of weight, bias and rows; None for none.
        tokens: the op, of images, weight, bias, rows and mean.
        gradients: the backward op, of images, weight, mean and needs.
    """
    need_grad, need_images, need_weight = needs
    of_weight, of_bias, of_rows = of_others
    no_mean = None if mean is None else [0.0] * len(mean)  # a change of the images is scaled, but has no offset
    d_grad = d_images = d_weight = None
    if need_grad:
        parts = []
        if of_weight is not None or of_bias is not None or of_rows is not None:
            change = torch.zeros_like(weight) if of_weight is None else of_weight
            parts.append(tokens(images, change, of_bias, of_rows, mean))
        if of_images is not None:
            parts.append(tokens(of_images, weight, None, None, no_mean))
        d_grad = sum(parts[1:], parts[0]) if parts else None
    if need_images and of_weight is not None:
        d_images = gradients(images, of_weight, mean, (True, False, False, False))[0]
    if need_weight and of_images is not None:
        d_weight = gradients(of_images, weight, no_mean, (False, True, False, False))[1]
    return d_grad, d_images, d_weight


def _second_gradients(ctx: Any, *changes: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, images, weight, keep = ctx.saved_tensors
    mean, std, compute_dtype, prefix_rows, needs, backend = ctx.rest

    def tokens(images: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, mean: Channels) -> Tensor:
        prefix = weight.new_zeros((prefix_rows, weight.shape[0])) if prefix_rows else None
        call = Arguments(
            images, weight.contiguous(), bias, rows, prefix, keep, mean, std, compute_dtype, torch.float32, backend
        )
        return patch_embed.call(*call)

    def gradients(images: Tensor, weight: Tensor, mean: Channels, needs: Needs) -> Any:
        call = BackwardArguments(
            grad, images, weight.contiguous(), keep, mean, std, compute_dtype, prefix_rows, needs, backend
        )
        return patch_embed_backward.call(*call)

    of_images, *of_others = (change if is_wanted else None for change, is_wanted in zip(changes, needs, strict=True))
    d_grad, d_images, d_weight = second_gradients(
        ctx.needs_input_grad[:3], images, weight, mean, of_images, of_others, tokens, gradients
    )
    return None if d_grad is None else d_grad.to(grad.dtype), d_images, d_weight


registry.differentiate(patch_embed_backward, BackwardArguments, _save_backward, _second_gradients)
