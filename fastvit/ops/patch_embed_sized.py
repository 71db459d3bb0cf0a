"""The ops `fastvit::patch_embed_sized` and `fastvit::patch_embed_sized_backward`.

What compiled programs have for `patch_embed_packed` where the images are one tensor and their sizes another, on the
host. A list of images, or of numbers, is as many constants of a program, which another number of images compiles anew;
a tensor has a dimension that may change. Sizes are looked at when the op runs, and all that depends on them is done in
it: views of the images, positions resampled, and the packed op itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastvit.checks import check_grids, check_windows, patches_in
from fastvit.cut_patches import ends_of, gradient_of_images, gradient_of_weight, views, weight_for
from fastvit.grids import grid_rows_gradient, position_rows, position_starts
from fastvit.ops import registry
from fastvit.ops.patch_embed_packed import patch_embed_packed, patch_embed_packed_backward
from fastvit.ops.registry import Channels, Needs
from fastvit.transfer import to_device

Grids = list[tuple[int, int]]


class Arguments(NamedTuple):
    """What `fastvit.functional.patch_embed_packed` was given, checked and settled but for the values of `sizes`."""

    weight: Tensor  # [D, C, P_h, P_w] or, for cut patches, [D, C, T, P_h, P_w]
    bias: Tensor | None  # [D]
    pos_embed: Tensor | None  # a grid [h, w, D], or a row a patch [ΣN, D]
    prefix: Tensor | None  # [R, D]
    images: Tensor  # pixels [Σ C·H_i·W_i] or patches [ΣN_i, K]
    sizes: Tensor  # [B, 2] on the host, rows and columns of patches
    order: str
    still: bool
    merge: int
    interpolation: str
    antialias: bool
    align_corners: bool | None
    mean: Channels  # of each channel of what `cut_patches.views` gives
    std: Channels
    compute_dtype: torch.dtype
    dtype: torch.dtype
    backend: str


def _fake(call: Arguments) -> tuple[Tensor, Tensor]:
    images, width = call.sizes.shape[0], call.weight.shape[0]
    prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    tokens = patches_in(call.images.shape, call.weight.shape) + images * prefix_rows
    offsets = call.weight.new_empty(images + 1, dtype=torch.int32)
    return call.weight.new_empty((tokens, width), dtype=call.dtype), offsets


def _grids(call: Any) -> Grids:
    """The sizes of a call, forward or backward, now that they have values."""
    grids = check_grids(call.sizes, call.images, call.weight)
    check_windows(call.merge, grids)
    return grids


def _kernel(call: Any) -> Tensor:
    """The weight as the views of the images meet it, in its own dtype."""
    with registry.without_autocast(call.weight.device.type):
        return weight_for(call.images, call.weight, call.order, call.still)


def _filter(call: Any) -> tuple[str, bool, bool | None]:
    return call.interpolation, call.antialias, call.align_corners


def _run(call: Arguments) -> tuple[Tensor, Tensor]:
    grids = _grids(call)
    table, starts = position_rows(call.pos_embed, grids, *_filter(call), call.merge)
    tokens = patch_embed_packed.run(
        _kernel(call),
        *(call.bias, table, call.prefix, views(call.images, call.weight, grids, call.still), starts),
        *(call.mean, call.std, call.compute_dtype, call.dtype, call.backend),
    )
    return tokens, to_device(ends_of(grids, call.prefix), torch.int32, call.weight.device)


def _product(images: Any, weight: Any) -> int:
    return 2 * patches_in(images, weight) * math.prod(weight)


def _flops(call: Any) -> int:
    return _product(call.images, call.weight)


patch_embed_sized = registry.define("patch_embed_sized", Arguments, "(Tensor, Tensor)", _fake, run=_run, flops=_flops)


class BackwardArguments(NamedTuple):
    """What the gradients need of the arguments, and the gradient of the tokens."""

    grad: Tensor  # [Σ R+N_i, D]
    weight: Tensor
    images: Tensor
    sizes: Tensor
    order: str
    still: bool
    merge: int
    interpolation: str
    antialias: bool
    align_corners: bool | None
    mean: Channels
    std: Channels
    compute_dtype: torch.dtype
    prefix_rows: int
    table: list[int]  # the shape of the positions; nothing where there are none
    needs: Needs  # of images, weight, bias, and prefix and positions
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, ...]:
    need_images, need_weight, need_bias, need_rows = call.needs
    width = call.weight.shape[0]
    new = call.grad.new_empty
    table = call.table or (0, width)
    return (
        new(call.images.shape if need_images else 0, dtype=call.images.dtype),  # without gaps, whatever images has
        call.weight.new_empty(call.weight.shape if need_weight else 0),
        new(width if need_bias else 0, dtype=torch.float32),
        new((call.prefix_rows, width) if need_rows else 0, dtype=torch.float32),
        new(table if need_rows else 0, dtype=torch.float32),
    )


def _run_backward(call: BackwardArguments) -> tuple[Tensor, ...]:
    need_images, need_weight, _, need_rows = call.needs
    grids, images, weight = _grids(call), call.images, call.weight
    starts, rows = position_starts(call.table, grids) if need_rows else ([0] * len(grids), 0)
    d_images, d_weight, d_bias, d_rows = patch_embed_packed_backward.run(
        *(call.grad, _kernel(call), views(images, weight, grids, call.still)),
        *(starts, call.mean, call.std, call.compute_dtype, call.prefix_rows, rows, call.needs, call.backend),
    )
    d_prefix, d_positions = d_rows[: call.prefix_rows].clone(), d_rows[call.prefix_rows :].clone()
    if need_rows and len(call.table) == 3:
        rows, columns, _ = call.table
        d_positions = grid_rows_gradient(d_positions, (rows, columns), grids, *_filter(call), call.merge)
    return (
        gradient_of_images(d_images, images, weight, call.still) if need_images else images.new_empty(0),
        gradient_of_weight(d_weight, images, weight, call.order, call.still) if need_weight else d_weight,
        d_bias,
        d_prefix,
        d_positions,
    )


def _backward_flops(call: Any) -> int:
    need_images, need_weight, *_ = call.needs
    return _product(call.images, call.weight) * (need_images + need_weight)


patch_embed_sized_backward = registry.define(
    "patch_embed_sized_backward",
    BackwardArguments,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    run=_run_backward,
    flops=_backward_flops,
)


def _save(ctx: Any, call: Arguments, _: Any) -> None:
    # Of positions, a row a patch of which is as much as the tokens, the shape is all that the gradients need.
    ctx.save_for_backward(call.weight, call.images, call.sizes)
    ctx.table = [] if call.pos_embed is None else list(call.pos_embed.shape)
    ctx.settings = call[call._fields.index("order") : call._fields.index("dtype")]
    ctx.prefix_rows = 0 if call.prefix is None else call.prefix.shape[0]
    ctx.dtypes = tuple(None if table is None else table.dtype for table in (call.bias, call.pos_embed, call.prefix))
    ctx.backend = call.backend


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    need_weight, need_bias, need_pos, need_prefix, need_images = ctx.needs_input_grad[:5]
    needs = (need_images, need_weight, need_bias, need_pos or need_prefix)
    d_images, d_weight, d_bias, d_prefix, d_positions = patch_embed_sized_backward(
        grad, *ctx.saved_tensors, *ctx.settings, ctx.prefix_rows, ctx.table, needs, ctx.backend
    )
    bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
    return (
        d_weight if need_weight else None,
        d_bias.to(bias_dtype) if need_bias else None,
        d_positions.to(pos_dtype) if need_pos else None,
        d_prefix.to(prefix_dtype) if need_prefix else None,
        d_images if need_images else None,
    )


registry.differentiate(patch_embed_sized, Arguments, _save, _gradients)


def _save_nothing(ctx: Any, call: BackwardArguments, _: Any) -> None:
    pass


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "sizes: patch_embed_packed with a tensor of them, compiled or exported, can be differentiated once; "
        "give Python numbers for derivatives of any order"
    )


# Without one torch would take the second derivative for zero.
registry.differentiate(patch_embed_sized_backward, BackwardArguments, _save_nothing, _refuse)
