"""patch_embed on a GPU: the launchers of the forward and backward kernels.

They choose a variant of the kernels by layout, alignment and dtype (see layout.VARIANTS), prepare weight and table,
allocate, and launch. Nothing here waits for the device, times anything, or reads a value of a tensor; a tuning table
(see fastvit.tuning), where there is one, names the tile of the forward GEMM and the programs of the weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels import launch
from fastvit.kernels.add_position import supported
from fastvit.kernels.layout import INT32_LIMIT, VARIANTS, KOrder, PatchLayout, cdiv, k_order, read_layout
from fastvit.kernels.manifest import Entry
from fastvit.kernels.normalisation import UINT8_SCALE, channel_constants, constants_on_device, image_gradient_constants
from fastvit.kernels.patch_embed_backward import ENTRIES as GRADIENTS
from fastvit.kernels.patch_embed_backward import IMAGE, REDUCE, WEIGHT
from fastvit.kernels.patch_embed_forward import entry_for, tiles_for
from fastvit.kernels.precision import product_precision
from fastvit.kernels.prepare_weight import make_table, prepare
from fastvit.kernels.row_sums import TARGET_PROGRAMS, sum_by_key, sum_rows
from fastvit.tuning import FORWARD, TRAINING, configuration

Normalisation = Sequence[float] | None


@dataclass(frozen=True)
class Plan:
    """A kernel that fits its tensors, and the reduction order it needs."""

    entry: Entry
    order: KOrder


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[B,C,H,W] images, [D,C,P_h,P_w] weight -> [B, R+N, D] tokens in dtype; [B, R+N_keep, D] with keep.

    Arguments as in ``fastvit.functional.patch_embed``, already checked. An index in keep that is out of range gives a
    row of NaN.
    """
    width = weight.shape[0]
    images, layout = read_layout(images, (weight.shape[2], weight.shape[3]))
    prefix_rows = prefix.shape[0] if prefix is not None else 0
    kept = layout.patches if keep is None else keep.shape[1]
    _check_sizes(layout.batch, prefix_rows + max(kept, layout.patches), width)
    rows = layout.batch * kept
    kernel_dtype = _kernel_dtype(compute_dtype, dtype)
    # A tile belongs to the forward pass alone, whether or not a backward pass will follow.
    problem = ("patch_embed", FORWARD, images.dtype, compute_dtype, dtype, weight.shape, keep is not None)
    tile = configuration(images.device, problem, rows).tile
    plan = _forward_plan(images, layout, width, compute_dtype, kernel_dtype, rows, tile)
    entry = plan.entry
    tokens = images.new_empty((layout.batch, prefix_rows + kept, width), dtype=_output(entry.key[0], kernel_dtype))
    if tokens.numel() == 0:
        return tokens.to(dtype)

    tf32 = product_precision(compute_dtype) == "tf32"
    constants = channel_constants(mean, std, layout.channels, images.dtype, compute_dtype, tf32)
    is_uint8 = images.dtype == torch.uint8
    prepared, normaliser, full_bias = prepare(weight, bias, constants, is_uint8, compute_dtype, layout, plan.order)
    factor = UINT8_SCALE if is_uint8 else 1.0
    table = make_table(prefix_rows + layout.patches, width, full_bias, pos_embed, prefix, factor, images)
    block_m, block_n = entry.constant("BLOCK_M"), entry.constant("BLOCK_N")
    tiles_m = cdiv(rows, block_m) + cdiv(layout.batch * prefix_rows, block_m)
    launch.launch(
        entry,
        (tiles_m * cdiv(width, block_n),),
        images_ptr=images,
        weight_ptr=prepared,
        table_ptr=table,
        normaliser_ptr=normaliser,
        keep_ptr=_keep(keep, images),
        tokens_ptr=tokens,
        rows=rows,
        prefix_rows=layout.batch * prefix_rows,
        kept=kept,
        patches=layout.patches,
        prefix=prefix_rows,
        **_layout_arguments(layout, plan, width),
        row_blocks=plan.order.row_blocks,
        steps=plan.order.steps,
        has_keep=int(keep is not None),
    )
    return tokens.to(dtype)


def forward_tiles(images: Tensor, weight: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the tiles between which `forward` can choose for such tensors."""
    images, layout = read_layout(images, (weight.shape[2], weight.shape[3]))
    kernel_dtype = _kernel_dtype(compute_dtype, dtype)
    plan = _forward_plan(images, layout, weight.shape[0], compute_dtype, kernel_dtype, layout.batch * layout.patches)
    variant = plan.entry.key[0]
    types = (images.dtype, compute_dtype, _output(variant, kernel_dtype), product_precision(compute_dtype))
    return tuple(tiles_for(variant, *types, weight.shape[0]))


def backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of images, weight, bias and table rows, each where needs has it, else of size 0.

    grad is [B, R+N, D], or [B, R+N_keep, D] with keep. d_images and d_weight have the shape and dtype of images and
    weight; d_bias is [D] and d_rows [R+N, D], both fp32: the gradient summed over patches, and over the batch.
    """
    need_images, need_weight, need_bias, need_rows = needs
    problem = ("patch_embed", TRAINING, images.dtype, compute_dtype, grad.dtype, weight.shape, keep is not None)
    programs = configuration(images.device, problem, grad.shape[0] * (grad.shape[1] - prefix_rows)).programs
    grad = supported(grad).contiguous()
    width = weight.shape[0]
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    _check_sizes(grad.shape[0], prefix_rows + max(patches, grad.shape[1]), width)

    d_images = images.new_empty(0)
    d_weight = weight.new_empty(0)
    d_bias = grad.new_empty(0, dtype=torch.float32)
    d_rows = grad.new_empty(0, dtype=torch.float32)
    product_grad = grad.to(compute_dtype) if need_images or need_weight else grad
    if need_rows or need_bias or (need_weight and mean is not None):
        d_rows = _row_gradients(grad, keep, prefix_rows, patches)
        d_bias = sum_rows(d_rows[prefix_rows:])
    if need_weight:
        d_weight = _weight_gradient(
            product_grad, images, weight, mean, std, keep, prefix_rows, d_bias, programs or TARGET_PROGRAMS
        )
    if need_images:
        d_images = _image_gradient(product_grad, images, weight, std, keep, prefix_rows)
    empty = grad.new_empty(0, dtype=torch.float32)
    return d_images, d_weight, d_bias if need_bias else empty, d_rows if need_rows else empty.clone()


def _row_gradients(grad: Tensor, keep: Tensor | None, prefix_rows: int, patches: int) -> Tensor:
    """[R+N, D] fp32: sum of grad over the batch, every token at the row of its position."""
    batch, length, width = grad.shape
    if keep is None:
        return sum_rows(grad.view(batch, length * width)).view(length, width)
    prefix = sum_rows(grad[:, :prefix_rows].contiguous().view(batch, prefix_rows * width)).view(prefix_rows, width)
    return torch.cat((prefix, sum_by_key(grad, keep, patches, prefix_rows, torch.float32)))


def _weight_gradient(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Normalisation,
    std: Normalisation,
    keep: Tensor | None,
    prefix_rows: int,
    d_bias: Tensor,
    programs: int,
) -> Tensor:
    """[D, C, P_h, P_w] in the weight's dtype, by split-K over the rows and a second pass over the parts.

    About `programs` of them share the work; their number sets the order in which rows are added.
    """
    width, channels, patch_height, patch_width = weight.shape
    images, layout = read_layout(images, (patch_height, patch_width))
    kept = layout.patches if keep is None else keep.shape[1]
    rows = layout.batch * kept
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if rows == 0:
        return d_weight.zero_()
    precision = product_precision(grad.dtype)
    plan = _plan(
        lambda variant: GRADIENTS.find(WEIGHT, variant, images.dtype, grad.dtype, precision),
        layout,
        width,
        [images, grad],
    )
    tf32 = precision == "tf32"
    constants = channel_constants(mean, std, channels, images.dtype, grad.dtype, tf32)
    is_uint8 = images.dtype == torch.uint8
    k_length = plan.order.length
    block_m, block_n, block_k = plan.entry.tile
    tiles = cdiv(width, block_n) * cdiv(k_length, block_k)
    splits = max(1, min(programs // tiles, cdiv(rows, 4 * block_m)))
    rows_per_split = cdiv(cdiv(rows, splits), block_m) * block_m
    splits = cdiv(rows, rows_per_split)
    parts = torch.empty(splits, width, k_length, dtype=torch.float32, device=grad.device)
    normaliser = parts
    if images.dtype != grad.dtype or tf32:
        _, normaliser, _ = prepare(weight, None, constants, is_uint8, grad.dtype, layout, plan.order)
    launch.launch(
        plan.entry,
        (tiles, splits),
        images_ptr=images,
        grad_ptr=grad,
        normaliser_ptr=normaliser,
        keep_ptr=_keep(keep, images),
        parts_ptr=parts,
        rows=rows,
        rows_per_split=rows_per_split,
        kept=kept,
        patches=layout.patches,
        prefix=prefix_rows,
        **_layout_arguments(layout, plan, width),
        padded_rows=plan.order.padded_rows,
        planes=plan.order.steps // plan.order.row_blocks,
        has_keep=int(keep is not None),
    )
    entry = GRADIENTS.one(REDUCE, weight.dtype, f"run{plan.order.run}")
    size = channels * patch_height * patch_width
    launch.launch(
        entry,
        (cdiv(width, entry.constant("BLOCK_D")), cdiv(size, entry.constant("BLOCK_E"))),
        parts_ptr=parts,
        constants_ptr=constants_on_device(constants, grad.device),
        bias_gradient_ptr=d_bias if mean is not None else parts,
        gradient_ptr=d_weight,
        width=width,
        channels=channels,
        patch_height=patch_height,
        patch_width=patch_width,
        k_length=k_length,
        padded_rows=plan.order.padded_rows,
        runs=plan.order.runs,
        splits=splits,
        channels_last=int(layout.channels_last),
        has_bias_gradient=int(mean is not None),
        inverse_factor=1.0 / UINT8_SCALE if is_uint8 else 1.0,
    )
    return d_weight


def _image_gradient(
    grad: Tensor, images: Tensor, weight: Tensor, std: Normalisation, keep: Tensor | None, prefix_rows: int
) -> Tensor:
    """[B, C, H, W] in the images' dtype; zero where a patch was not kept."""
    d_images = torch.empty_like(images)
    if images.numel() == 0:
        return d_images
    target, layout = read_layout(d_images, (weight.shape[2], weight.shape[3]))
    width, rows = weight.shape[0], layout.batch * layout.patches
    if keep is not None:
        grad = _scatter(grad, keep, layout.patches, prefix_rows)
        prefix_rows = 0
    precision = product_precision(grad.dtype)
    plan = _plan(
        lambda variant: GRADIENTS.find(IMAGE, variant, _output(variant, target.dtype), grad.dtype, precision),
        layout,
        width,
        [target, grad],
    )
    if _output(plan.entry.key[0], target.dtype) != target.dtype:
        target = torch.empty_like(target, dtype=torch.float32)
    constants = image_gradient_constants(std, layout.channels)
    prepared, normaliser, _ = prepare(weight, None, constants, False, grad.dtype, layout, plan.order)
    block_m, _, block_k = plan.entry.tile
    launch.launch(
        plan.entry,
        (cdiv(rows, block_m) * cdiv(plan.order.length, block_k),),
        grad_ptr=grad,
        weight_ptr=prepared,
        normaliser_ptr=normaliser,
        images_ptr=target,
        rows=rows,
        patches=layout.patches,
        prefix=prefix_rows,
        **_layout_arguments(layout, plan, width),
        padded_rows=plan.order.padded_rows,
        planes=plan.order.steps // plan.order.row_blocks,
    )
    return d_images if target is d_images else d_images.copy_(target)


def _scatter(grad: Tensor, keep: Tensor, patches: int, prefix_rows: int) -> Tensor:
    """[B, R+N_keep, D] -> [B, N, D]: the gradient of every patch, zero where it was not kept."""
    batch, _, width = grad.shape
    first = torch.arange(batch, device=keep.device)[:, None] * patches
    keys = torch.where((keep >= 0) & (keep < patches), keep + first, -1)
    return sum_by_key(grad, keys, batch * patches, prefix_rows, grad.dtype).view(batch, patches, width)


def _forward_plan(
    images: Tensor,
    layout: PatchLayout,
    width: int,
    compute_dtype: torch.dtype,
    kernel_dtype: torch.dtype,
    rows: int,
    tile: str | None = None,
) -> Plan:
    precision = product_precision(compute_dtype)
    return _plan(
        lambda variant: entry_for(
            variant, images.dtype, compute_dtype, _output(variant, kernel_dtype), precision, rows, width, tile
        ),
        layout,
        width,
        [images],
    )


def _plan(find: Callable[[str], Entry | None], layout: PatchLayout, width: int, tensors: Sequence[Tensor]) -> Plan:
    """The first variant that fits the layout and for which find has an entry; the last one, generic, always does."""
    addresses_aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    for name, variant in VARIANTS.items():
        fits = name == "generic" or (
            addresses_aligned
            and width % variant.width_align == 0
            and layout.alignment % variant.align == 0
            and (variant.masked or (layout.stretch % variant.run == 0 and layout.patch_height % variant.rows == 0))
        )
        entry = find(name) if fits else None
        if entry is not None:
            return Plan(entry, k_order(layout, variant.run, variant.rows))
    raise AssertionError("the generic variant takes every dtype")


def _kernel_dtype(compute_dtype: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What the forward kernels write; another pass rounds where tokens are wanted in a third dtype."""
    return dtype if dtype == compute_dtype else torch.float32


def _output(variant: str, dtype: torch.dtype) -> torch.dtype:
    """The generic kernels write fp32, and another pass rounds."""
    return torch.float32 if variant == "generic" else dtype


def _layout_arguments(layout: PatchLayout, plan: Plan, width: int) -> dict[str, Any]:
    """The scalars that all kernels share; see layout.py and the units in patch_embed_forward.py."""
    align = plan.entry.constant("ALIGN")
    return {
        "grid_width": layout.grid_width,
        "width_units": width // plan.entry.constant("WIDTH_ALIGN"),
        "batch_stride_units": layout.batch_stride // align,
        "channel_stride_units": layout.channel_stride // align,
        "row_stride_units": layout.row_stride // align,
        "stretch_units": layout.stretch // align,
        "patch_height": layout.patch_height,
        "runs": plan.order.runs,
    }


def _keep(keep: Tensor | None, like: Tensor) -> Tensor:
    """keep, or a tensor of its dtype that is never read."""
    return keep.contiguous() if keep is not None else torch.empty(1, dtype=torch.int64, device=like.device)


def _check_sizes(batch: int, length: int, width: int) -> None:
    if batch * length >= INT32_LIMIT or length * width >= INT32_LIMIT:
        raise ValueError(f"images: {batch} x {length} tokens of width {width}; rows and values a sample must be < 2^31")
