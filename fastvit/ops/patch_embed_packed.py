"""The ops `fastvit::patch_embed_packed` and `fastvit::patch_embed_packed_backward`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import registry
from fastvit.ops.decompositions import normalised
from fastvit.ops.patch_embed import second_gradients
from fastvit.ops.registry import Channels, Needs


class Arguments(NamedTuple):
    """What `fastvit.functional.patch_embed_packed` was given, checked and settled."""

    weight: Tensor  # [D, C, P_h, P_w]
    bias: Tensor | None  # [D]
    pos_embed: Tensor | None  # [P, D]
    prefix: Tensor | None  # [R, D]
    images: list[Tensor]  # [C, H_i, W_i]
    starts: list[int]  # of each image the row of pos_embed that is its first patch's; the others' follow
    mean: Channels
    std: Channels
    compute_dtype: torch.dtype
    dtype: torch.dtype
    backend: str


def _patches(image: Any, weight: Any) -> int:
    """Of an image, from shapes."""
    return (image[1] // weight[2]) * (image[2] // weight[3])


def _all_patches(images: list[Tensor], weight: Tensor) -> int:
    return sum(_patches(image.shape, weight.shape) for image in images)


def _fake(call: Arguments) -> Tensor:
    prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    tokens = _all_patches(call.images, call.weight) + len(call.images) * prefix_rows
    return call.weight.new_empty((tokens, call.weight.shape[0]), dtype=call.dtype)


def _plain(call: Arguments) -> Tensor:
    """By the reference an image at a time, at the precision asked for."""
    compute_dtype = call.compute_dtype
    weight, bias = (None if each is None else each.to(compute_dtype) for each in (call.weight, call.bias))
    assert weight is not None
    tokens = [weight.new_empty((0, weight.shape[0]), dtype=call.dtype)]
    with registry.without_autocast(weight.device.type):
        for image, start in zip(call.images, call.starts, strict=True):
            rows = slice(start, start + _patches(image.shape, weight.shape))
            own = reference.patch_embed(
                normalised(image[None], call.mean, call.std, compute_dtype),
                weight,
                bias,
                pos_embed=None if call.pos_embed is None else call.pos_embed[rows],
                prefix=call.prefix,
                dtype=call.dtype,
            )
            tokens.append(own[0])
    return torch.cat(tokens)


def _product(images: Any, weight: Any) -> int:
    return 2 * sum(_patches(image, weight) for image in images) * math.prod(weight)


def _flops(call: Any) -> int:
    return _product(call.images, call.weight)


patch_embed_packed = registry.define("patch_embed_packed", Arguments, "Tensor", _fake, plain=_plain, flops=_flops)


class BackwardArguments(NamedTuple):
    """What the gradients need of the arguments, and the gradient of the tokens."""

    grad: Tensor  # [Σ R+N_i, D]
    weight: Tensor
    images: list[Tensor]
    starts: list[int]
    mean: Channels
    std: Channels
    compute_dtype: torch.dtype
    prefix_rows: int
    table_rows: int
    needs: Needs  # of images, weight, bias, and prefix and table rows
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    grad, weight = call.grad, call.weight
    need_images, need_weight, need_bias, need_rows = call.needs
    rows = (call.prefix_rows + call.table_rows, weight.shape[0])
    return (
        [torch.empty_like(image) for image in call.images] if need_images else [],
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        grad.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
        grad.new_empty(rows if need_rows else (0,), dtype=torch.float32),
    )


def _backward_flops(call: Any) -> int:
    need_images, need_weight, *_ = call.needs
    return _product(call.images, call.weight) * (need_images + need_weight)


patch_embed_packed_backward = registry.define(
    "patch_embed_packed_backward",
    BackwardArguments,
    "(Tensor[], Tensor, Tensor, Tensor)",
    _backward_fake,
    flops=_backward_flops,
)


def _save(ctx: Any, call: Arguments, _: Any) -> None:
    # The images are saved as they came (uint8 stays uint8); patches are rebuilt in backward, never stored.
    ctx.save_for_backward(call.weight, *call.images)
    ctx.prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    ctx.table_rows = 0 if call.pos_embed is None else call.pos_embed.shape[0]
    ctx.starts, ctx.normalisation, ctx.compute_dtype = call.starts, (call.mean, call.std), call.compute_dtype
    ctx.dtypes = tuple(None if table is None else table.dtype for table in (call.bias, call.pos_embed, call.prefix))
    ctx.backend = call.backend


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_weight, need_bias, need_pos, need_prefix, need_images = ctx.needs_input_grad[:5]
    of_each = need_images if isinstance(need_images, (list, tuple)) else [need_images] * len(ctx.starts)
    weight, *images = ctx.saved_tensors
    needs = (any(of_each), need_weight, need_bias, need_pos or need_prefix)
    d_images, d_weight, d_bias, d_rows = patch_embed_packed_backward(
        grad,
        weight,
        images,
        ctx.starts,
        *ctx.normalisation,
        ctx.compute_dtype,
        ctx.prefix_rows,
        ctx.table_rows,
        needs,
        ctx.backend,
    )
    bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    return (
        d_weight if need_weight else None,
        d_bias.to(bias_dtype) if need_bias else None,
        d_rows[ctx.prefix_rows :].to(pos_dtype) if need_pos else None,
        d_rows[: ctx.prefix_rows].to(prefix_dtype) if need_prefix else None,
        _of_those_wanted(d_images, of_each),
        None if ctx.starts else [],  # torch takes an empty list for one of tensors
    )


def _of_those_wanted(d_images: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [d_images[i] if need else None for i, need in enumerate(needs)]


registry.differentiate(patch_embed_packed, Arguments, _save, _gradients)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call.grad, call.weight, *call.images)
    ctx.rest = call[3:]


def _second_gradients(ctx: Any, of_images: list[Tensor | None], *others: Tensor | None) -> tuple[Any, ...]:
    grad, weight, *images = ctx.saved_tensors
    starts, mean, std, compute_dtype, prefix_rows, table_rows, needs, backend = ctx.rest

    def tokens(
        images: list[Tensor], weight: Tensor, bias: Tensor | None, rows: Tensor | None, mean: Channels
    ) -> Tensor:
        rows = weight.new_zeros((prefix_rows, weight.shape[0])) if rows is None else rows
        prefix, table = (part if len(part) else None for part in (rows[:prefix_rows], rows[prefix_rows:]))
        call = Arguments(weight, bias, table, prefix, images, starts, mean, std, compute_dtype, torch.float32, backend)
        return patch_embed_packed.call(*call)

    def gradients(images: list[Tensor], weight: Tensor, mean: Channels, needs: Needs) -> Any:
        settings = starts, mean, std, compute_dtype, prefix_rows, table_rows, needs, backend
        return patch_embed_packed_backward.call(grad, weight, images, *settings)

    need_grad, need_weight, of_each = ctx.needs_input_grad[:3]
    d_grad, d_images, d_weight = second_gradients(
        (need_grad, any(of_each), need_weight),
        images,
        weight,
        mean,
        _with_zeros(of_images, images),
        [change if is_wanted else None for change, is_wanted in zip(others, needs[1:], strict=True)],
        tokens,
        gradients,
    )
    return (
        None if d_grad is None else d_grad.to(grad.dtype),
        d_weight,
        [None] * len(images) if d_images is None else _of_those_wanted(d_images, of_each),
        None if starts else [],  # as in _gradients
    )


def _with_zeros(changes: list[Tensor | None], images: list[Tensor]) -> list[Tensor] | None:
    """The images' changes, for those that have none zero; None where no image has one."""
    if all(change is None for change in changes):
        return None
    return [
        torch.zeros_like(image) if change is None else change for change, image in zip(changes, images, strict=True)
    ]


registry.differentiate(patch_embed_packed_backward, BackwardArguments, _save_backward, _second_gradients)
