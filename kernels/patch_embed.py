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
from fastvit.kernels.prepare_weight import prepare
from fastvit.kernels.row_sums import TARGET_PROGRAMS, sum_by_key, sum_rows
from fastvit.tuning import FORWARD, TRAINING, Configuration, configuration

Normalisation = Sequence[float] | None
# Neighbouring patches of an image whose rows follow each other, where they divide N, before as many of the next image:
# a tile then adds so many rows of the table, and not one for each of its own, and reads 64 bytes of uint8 at a place.
TOGETHER = 4
MOST_IMAGES = 1024  # that a program of the weight gradient sums rows of, where there are few columns


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
    kernel_dtype = kernel_dtype_of(compute_dtype, dtype)
    # A tile belongs to the forward pass alone, whether or not a backward pass will follow.
    problem = ("patch_embed", FORWARD, images.dtype, compute_dtype, dtype, weight.shape, keep is not None)
    tile = configuration(images.device, problem, rows).tile
    plan = _forward_plan(images, layout, width, compute_dtype, kernel_dtype, rows, tile)
    entry = plan.entry
    tokens = images.new_empty((layout.batch, prefix_rows + kept, width), dtype=output_of(entry.key[0], kernel_dtype))
    if tokens.numel() == 0:
        return tokens.to(dtype)

    tf32 = product_precision(compute_dtype) == "tf32"
    constants = channel_constants(mean, std, layout.channels, images.dtype, compute_dtype, tf32)
    prepared = prepare(
        weight,
        constants,
        images.dtype == torch.uint8,
        compute_dtype,
        layout,
        plan.order,
        prefix_rows + layout.patches,
        bias,
        pos_embed,
        prefix,
    )
    block_m, block_n = entry.constant("BLOCK_M"), entry.constant("BLOCK_N")
    tiles_m = cdiv(rows, block_m) + cdiv(layout.batch * prefix_rows, block_m)
    launch.launch(
        entry,
        (tiles_m * cdiv(width, block_n),),
        images_ptr=images,
        weight_ptr=prepared.weight,
        table_ptr=prepared.table,
        normaliser_ptr=prepared.normaliser,
        keep_ptr=_keep(keep, images),
        tokens_ptr=tokens,
        rows=rows,
        prefix_rows=layout.batch * prefix_rows,
        kept=kept,
        images=layout.batch,
        together=TOGETHER if keep is None and kept % TOGETHER == 0 else kept,
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
    kernel_dtype = kernel_dtype_of(compute_dtype, dtype)
    plan = _forward_plan(images, layout, weight.shape[0], compute_dtype, kernel_dtype, layout.batch * layout.patches)
    variant = plan.entry.key[0]
    types = (images.dtype, compute_dtype, output_of(variant, kernel_dtype), product_precision(compute_dtype))
    return tuple(tiles_for(variant, *types, weight.shape[0]))


def weight_tiles(images: Tensor, weight: Tensor, compute_dtype: torch.dtype, has_keep: bool) -> tuple[str, ...]:
    """Names of the tiles between which the weight gradient can choose for such tensors."""
    images, layout = read_layout(images, (weight.shape[2], weight.shape[3]))
    grad = weight.new_empty((0, weight.shape[0]), dtype=compute_dtype)
    variant, _, *types = _weight_plan(images, layout, grad, has_keep, None).entry.key
    return tuple(key[2] for key in GRADIENTS if key[:2] == (WEIGHT, variant) and list(key[3:]) == types)


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
    configured = configuration(images.device, problem, grad.shape[0] * (grad.shape[1] - prefix_rows))
    grad = supported(grad).contiguous()
    batch, length, width = grad.shape
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    _check_sizes(batch, prefix_rows + max(patches, length), width)

    d_images = images.new_empty(0)
    d_weight = weight.new_empty(0)
    empty = d_rows = d_bias = grad.new_empty(0, dtype=torch.float32)
    product_grad = grad.to(compute_dtype) if need_images or need_weight else grad
    rows_wanted = need_rows or need_bias or (need_weight and mean is not None)
    write_rows = rows_wanted and need_weight and product_grad is grad and keep is None and _may_ride(grad)
    if write_rows:
        d_rows = torch.empty_like(grad[0], dtype=torch.float32)
    elif rows_wanted:
        d_rows = _row_gradients(grad, keep, prefix_rows, patches)
    if need_weight:
        d_weight, d_bias = _weight_gradient(
            product_grad, images, weight, mean, std, keep, prefix_rows, d_rows, write_rows, configured
        )
    elif need_bias:
        d_bias = sum_rows(d_rows[prefix_rows:])
    if need_images:
        d_images = _image_gradient(product_grad, images, weight, std, keep, prefix_rows)
    return d_images, d_weight, d_bias if need_bias else empty, d_rows if need_rows else empty.clone()


def _may_ride(grad: Tensor) -> bool:
    """Whether the weight gradient's own launch may sum the rows of grad [B, R+N, D]: a program sums some columns over
    the whole batch, which would take long where many images meet few columns."""
    batch, length, width = grad.shape
    return batch > 0 and (batch <= MOST_IMAGES or length * width >= 64 * TARGET_PROGRAMS)


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
    d_rows: Tensor,
    write_rows: bool,
    configured: Configuration,
) -> tuple[Tensor, Tensor]:
    """[D, C, P_h, P_w] in the weight's dtype, by split-K over the rows and a second pass over the parts; and the
    gradient of the bias [D] from d_rows, where there is one, which the first pass writes with write_rows.

    About as many programs as `configured` says share the work; their number sets the order in which rows are added.
    """
    width, channels, patch_height, patch_width = weight.shape
    images, layout = read_layout(images, (patch_height, patch_width))
    kept = layout.patches if keep is None else keep.shape[1]
    rows = layout.batch * kept
    if rows == 0:
        return weight.new_zeros(weight.shape), weight.new_zeros(width, dtype=torch.float32)
    plan = _weight_plan(images, layout, grad, keep is not None, configured.weight_tile)
    is_uint8 = images.dtype == torch.uint8
    tf32 = product_precision(grad.dtype) == "tf32"
    constants = constants_on_device(channel_constants(mean, std, channels, images.dtype, grad.dtype, tf32), grad.device)
    k_length = plan.order.length
    block_m, block_n, block_k = plan.entry.tile
    tiles = cdiv(width, block_n) * cdiv(k_length, block_k)
    programs = configured.programs or TARGET_PROGRAMS
    splits = max(1, min(programs // tiles, cdiv(rows, 4 * block_m)))
    rows_per_split = cdiv(cdiv(rows, splits), block_m) * block_m
    splits = cdiv(rows, rows_per_split)
    parts = torch.empty(splits, width, k_length, dtype=torch.float32, device=grad.device)
    launch.launch(
        plan.entry,
        (tiles, splits),
        images_ptr=images,
        grad_ptr=grad,
        constants_ptr=constants,
        keep_ptr=_keep(keep, images),
        parts_ptr=parts,
        row_sums_ptr=d_rows if write_rows else parts,
        images=layout.batch if write_rows else 0,
        channels=channels,
        channels_last=int(layout.channels_last),
        rows=rows,
        rows_per_split=rows_per_split,
        kept=kept,
        patches=layout.patches,
        prefix=prefix_rows,
        **_layout_arguments(layout, plan, width),
        padded_rows=plan.order.padded_rows,
        planes=plan.order.steps // plan.order.row_blocks,
    )
    row_sums = d_rows if d_rows.numel() else None
    return reduce_parts(parts, row_sums, weight, layout, plan.order, constants, prefix_rows, is_uint8)


def reduce_parts(
    parts: Tensor,
    row_sums: Tensor | None,
    weight: Tensor,
    layout: PatchLayout,
    order: KOrder,
    constants: Tensor,
    prefix_rows: int,
    is_uint8: bool,
) -> tuple[Tensor, Tensor]:
    """parts [splits, D, K] -> the gradient of the weight, in its shape and dtype, and of the bias [D] fp32, which is
    the sum of row_sums [R+rows, D] behind the prefix; without them it is not filled."""
    width, channels, patch_height, patch_width = weight.shape
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    d_bias = torch.empty(width, dtype=torch.float32, device=weight.device)
    entry = GRADIENTS.one(REDUCE, weight.dtype, f"run{order.run}")
    size = channels * patch_height * patch_width
    launch.launch(
        entry,
        (cdiv(width, entry.constant("BLOCK_D")), cdiv(size, entry.constant("BLOCK_E"))),
        parts_ptr=parts,
        constants_ptr=constants,
        row_sums_ptr=parts if row_sums is None else row_sums,
        bias_gradient_ptr=d_bias,
        gradient_ptr=d_weight,
        width=width,
        channels=channels,
        patch_height=patch_height,
        patch_width=patch_width,
        k_length=order.length,
        padded_rows=order.padded_rows,
        runs=order.runs,
        splits=parts.shape[0],
        channels_last=int(layout.channels_last),
        prefix=prefix_rows,
        patches=0 if row_sums is None else row_sums.shape[0] - prefix_rows,
        inverse_factor=1.0 / UINT8_SCALE if is_uint8 else 1.0,
    )
    return d_weight, d_bias


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
    plan = plan_for(
        lambda variant: GRADIENTS.find(IMAGE, variant, output_of(variant, target.dtype), grad.dtype, precision),
        layout,
        width,
        [target, grad],
    )
    if output_of(plan.entry.key[0], target.dtype) != target.dtype:
        target = torch.empty_like(target, dtype=torch.float32)
    constants = image_gradient_constants(std, layout.channels)
    prepared = prepare(weight, constants, False, grad.dtype, layout, plan.order)
    block_m, _, block_k = plan.entry.tile
    launch.launch(
        plan.entry,
        (cdiv(rows, block_m) * cdiv(plan.order.length, block_k),),
        grad_ptr=grad,
        weight_ptr=prepared.weight,
        constants_ptr=constants_on_device(constants, grad.device),
        images_ptr=target,
        channels=layout.channels,
        channels_last=int(layout.channels_last),
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
    return plan_for(
        lambda variant: entry_for(
            variant, images.dtype, compute_dtype, output_of(variant, kernel_dtype), precision, rows, width, tile
        ),
        layout,
        width,
        [images],
    )


def _weight_plan(images: Tensor, layout: PatchLayout, grad: Tensor, has_keep: bool, tile: str | None) -> Plan:
    """The preferred tile of the weight gradient where its variant has it."""
    types = (images.dtype, grad.dtype, product_precision(grad.dtype), "keep" if has_keep else "")

    def find(variant: str) -> Entry | None:
        preferred = GRADIENTS.find(WEIGHT, variant, tile, *types) if tile else None
        return preferred or GRADIENTS.find(WEIGHT, variant, "generic" if variant == "generic" else "medium", *types)

    return plan_for(find, layout, grad.shape[-1], [images, grad])


def plan_for(find: Callable[[str], Entry | None], layout: PatchLayout, width: int, tensors: Sequence[Tensor]) -> Plan:
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
            rows = entry.constants_by_name.get("ROWS", variant.rows)
            return Plan(entry, k_order(layout, variant.run, rows))
    raise AssertionError("the generic variant takes every dtype")


def kernel_dtype_of(compute_dtype: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What the forward kernels write; another pass rounds where tokens are wanted in a third dtype."""
    return dtype if dtype == compute_dtype else torch.float32


def output_of(variant: str, dtype: torch.dtype) -> torch.dtype:
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


# Calls that stand for the op where launches are counted: ViT-B/16 at 224 pixels, 256 uint8 images, in bfloat16.
def _example(parameters: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = torch.empty(256, 3, 224, 224, dtype=torch.uint8, device="meta")
    shapes = ((768, 3, 16, 16), (768,), (196, 768), (1, 768))
    weight, bias, positions, prefix = (torch.empty(shape, dtype=parameters, device="meta") for shape in shapes)
    return images, weight, bias, positions, prefix


def _example_forward(parameters: torch.dtype) -> Tensor:
    constants = [0.5] * 3
    return forward(*_example(parameters), None, constants, constants, torch.bfloat16, torch.bfloat16)


def _example_backward() -> tuple[Tensor, ...]:
    images, weight, *_ = _example(torch.float32)
    grad, constants = torch.empty(256, 197, 768, dtype=torch.bfloat16, device="meta"), [0.5] * 3
    needs = (False, True, True, True)
    return backward(grad, images, weight, None, constants, constants, torch.bfloat16, 1, needs)


CALLS = {
    "patch_embed forward, fp32 parameters": lambda: _example_forward(torch.float32),
    "patch_embed forward, bf16 parameters": lambda: _example_forward(torch.bfloat16),
    "patch_embed backward of all parameters": _example_backward,
}
