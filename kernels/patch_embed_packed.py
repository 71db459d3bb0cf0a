"""patch_embed of images of any sizes at once: products whose rows are the patches of all images, one behind the other.

    tokens[m + (i+1)·R] = bias + positions[start_i + n] + sum_k pixel(i, n, k) * weight[:, k]     patch n of image i
    tokens[...]         = prefix                                                                  the R rows before it

The rows of a tile may be those of several images, whose strides differ: where each lies and belongs is found before
(packed_rows.py). All else is as in patch_embed_forward.py and patch_embed_backward.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastvit import grids
from fastvit.cpu import patch_embed_packed as plain
from fastvit.kernels import launch, manifest
from fastvit.kernels.add_position import supported
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import IMAGES, INT32_LIMIT, PRODUCTS, VARIANTS, cdiv, copies_of
from fastvit.kernels.manifest import Entry
from fastvit.kernels.normalisation import channel_constants, constants_on_device
from fastvit.kernels.packed_images import Images, read_images
from fastvit.kernels.packed_rows import placed, sum_positions
from fastvit.kernels.patch_embed import Normalisation, Plan, kernel_dtype_of, output_of, plan_for, reduce_parts
from fastvit.kernels.patch_embed_backward import columns_of
from fastvit.kernels.patch_embed_forward import as_multiplied, store_tokens, tile_of
from fastvit.kernels.precision import product_precision, round_to_tf32
from fastvit.kernels.prepare_weight import prepare
from fastvit.kernels.row_sums import TARGET_PROGRAMS, sum_rows
from fastvit.tuning import TRAINING, configuration


def _packed_forward(
    images_ptr,  # the image with the lowest address, from which the origins of all count
    weight_ptr,  # [D, steps * BLOCK_K] in the order of layout.py, in the compute dtype
    table_ptr,  # [R+1, D] fp32: the prefix, and behind it what every patch starts from
    positions_ptr,  # [P, D], read only with has_positions
    normaliser_ptr,  # [2, steps * BLOCK_K] fp32: shift, scale; read only where images must be converted
    first_ptr,  # [B] int64: the first row of each image
    origins_ptr,  # [rows] int64
    places_ptr,  # [4, rows] int32
    tokens_ptr,  # [rows + B*R, D]
    rows: tl.int32,  # patches of all images
    prefix_rows: tl.int32,  # B * R
    prefix: tl.int32,  # R
    width_units: tl.int32,  # D
    stretch_units: tl.int32,
    patch_height: tl.int32,
    runs: tl.int32,
    row_blocks: tl.int32,
    steps: tl.int32,
    has_positions: tl.int32,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    MASKED: tl.constexpr,  # a stretch or the rows of a patch may end inside a step
    PRECISION: tl.constexpr,  # of products of fp32: "ieee" or "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    BLOCK_K: tl.constexpr = RUN * ROWS
    COMPUTE: tl.constexpr = weight_ptr.dtype.element_ty
    TF32: tl.constexpr = PRECISION == "tf32"
    CONVERT: tl.constexpr = images_ptr.dtype.element_ty != weight_ptr.dtype.element_ty or TF32
    UINT8: tl.constexpr = images_ptr.dtype.element_ty == tl.uint8
    width = width_units * WIDTH_ALIGN
    stretch = stretch_units * ALIGN

    patch_tiles = tl.cdiv(rows, BLOCK_M)
    tiles_m = patch_tiles + tl.cdiv(prefix_rows, BLOCK_M)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(width, BLOCK_N), GROUP_M)
    is_prefix = tile_m >= patch_tiles
    total = tl.where(is_prefix, prefix_rows, rows)
    m = (tile_m - tl.where(is_prefix, patch_tiles, 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one, which needs no mask in the loop; only the store is masked.
    m_safe = tl.minimum(m, total - 1)
    patch_row = tl.where(is_prefix, 0, m_safe)

    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_safe = tl.minimum(d, width - 1)
    in_width = (d < width)[None, :]
    table_row = tl.where(is_prefix, m_safe % tl.maximum(prefix, 1), prefix)
    acc = tl.load(table_ptr + (table_row * width)[:, None] + d[None, :], mask=in_width, other=0.0)
    rows_wide = rows.to(tl.int64)
    if (has_positions != 0) & (is_prefix == 0):
        position = tl.load(places_ptr + 2 * rows_wide + patch_row).to(tl.int64)
        positions_ptrs = positions_ptr + (position * width)[:, None] + d[None, :]
        added = tl.load(positions_ptrs, mask=in_width, other=0.0).to(tl.float32)
        acc += added * 256.0 if UINT8 else added  # as the weights of uint8 images are, see prepare_weight.py

    origin = tl.load(origins_ptr + patch_row) * ALIGN
    channel_stride = tl.load(places_ptr + patch_row) * ALIGN
    row_stride = tl.load(places_ptr + rows_wide + patch_row) * ALIGN
    k = tl.arange(0, BLOCK_K)
    row_in_step = k // RUN
    column = k % RUN
    image_ptrs = images_ptr + origin[:, None] + (row_in_step[None, :] * row_stride[:, None] + column[None, :])
    weight_ptrs = weight_ptr + (d_safe.to(tl.int64) * (steps * BLOCK_K))[:, None] + k[None, :]
    for step in range(0, tl.where(is_prefix, 0, steps)):
        plane = step // row_blocks
        channel = plane // runs
        run_start = (plane - channel * runs) * RUN
        row_start = (step - plane * row_blocks) * ROWS
        offset = channel * channel_stride + row_start * row_stride + run_start
        if MASKED:
            inside = (column < stretch - run_start) & (row_in_step < patch_height - row_start)
            pixels = tl.load(image_ptrs + offset[:, None], mask=inside[None, :], other=0)
        else:
            pixels = tl.load(image_ptrs + offset[:, None])
        pixels = as_multiplied(
            pixels, normaliser_ptr, step * BLOCK_K, (steps + step) * BLOCK_K, k, CONVERT, TF32, COMPUTE
        )
        weight = tl.load(weight_ptrs + step * BLOCK_K)
        acc = tl.dot(pixels, weight.T, acc, input_precision=PRECISION)

    if UINT8:
        acc = acc * 0.00390625  # 1/256
    image = m // tl.maximum(prefix, 1)
    before = tl.load(first_ptr + image, mask=is_prefix & (m < total), other=0)  # patches of the images before
    token = before + m
    if is_prefix == 0:
        token = tl.load(places_ptr + 3 * rows_wide + m, mask=m < total, other=0).to(tl.int64)
    store_tokens(tokens_ptr, token, acc, m < total, tile_n * BLOCK_N, width, BLOCK_M, BLOCK_N)


def _packed_weight_gradient(
    images_ptr,  # the image with the lowest address, from which the origins of all count
    grad_ptr,  # [rows + B*R, D] in the compute dtype
    constants_ptr,  # [4, C] fp32: the fields of ChannelConstants; read only where images must be converted
    origins_ptr,  # [rows] int64
    places_ptr,  # [4, rows] int32
    parts_ptr,  # [splits, D, K] fp32
    channels: tl.int32,
    channels_last: tl.int32,
    rows: tl.int32,  # patches of all images
    rows_per_split: tl.int32,  # a multiple of BLOCK_M
    width_units: tl.int32,  # D
    stretch_units: tl.int32,
    patch_height: tl.int32,
    runs: tl.int32,
    padded_rows: tl.int32,
    planes: tl.int32,  # K = planes * padded_rows * RUN
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COMPUTE: tl.constexpr = grad_ptr.dtype.element_ty
    TF32: tl.constexpr = PRECISION == "tf32"
    CONVERT: tl.constexpr = images_ptr.dtype.element_ty != grad_ptr.dtype.element_ty or TF32
    UINT8: tl.constexpr = images_ptr.dtype.element_ty == tl.uint8
    width = width_units * WIDTH_ALIGN
    stretch = stretch_units * ALIGN
    k_length = planes * padded_rows * RUN

    tiles_k = tl.cdiv(k_length, BLOCK_K)
    tile_n = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) - tile_n * tiles_k
    split = tl.program_id(1)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    apart, row, place, channel = columns_of(k, padded_rows, planes, runs, channels, channels_last, RUN)
    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if CONVERT:
        shift = tl.load(constants_ptr + channels + channel)

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    start = split * rows_per_split
    # Known one step ahead, so that the loads of the pixels need not wait for these.
    ahead = tl.minimum(start + tl.arange(0, BLOCK_M), rows - 1)
    rows_ptr = places_ptr + rows.to(tl.int64)
    tokens_ptr = rows_ptr + 2 * rows.to(tl.int64)
    next_origin = tl.load(origins_ptr + ahead)
    next_channel = tl.load(places_ptr + ahead)
    next_row = tl.load(rows_ptr + ahead)
    next_token = tl.load(tokens_ptr + ahead)
    for m_start in range(start, tl.minimum(start + rows_per_split, rows), BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        valid = m < rows
        offset = apart[None, :] * (next_channel * ALIGN)[:, None] + row[None, :] * (next_row * ALIGN)[:, None]
        image_ptrs = images_ptr + (next_origin * ALIGN)[:, None] + (offset + place[None, :])
        token = next_token.to(tl.int64)
        ahead = tl.minimum(m + BLOCK_M, rows - 1)
        next_origin = tl.load(origins_ptr + ahead)
        next_channel = tl.load(places_ptr + ahead)
        next_row = tl.load(rows_ptr + ahead)
        next_token = tl.load(tokens_ptr + ahead)
        if MASKED:
            inside = (place < stretch) & (row < patch_height)
            pixels = tl.load(image_ptrs, mask=valid[:, None] & inside[None, :], other=0)
        else:
            pixels = tl.load(image_ptrs, mask=valid[:, None], other=0)
        if CONVERT:
            pixels = pixels.to(tl.float32) - shift[None, :]
            if not UINT8:  # the scale of uint8 is applied to the sum
                # Loaded anew at every step: kept throughout the loop it would cost registers that there are not.
                pixels = pixels * tl.load(constants_ptr + 3 * channels + channel)[None, :]
            pixels = pixels.to(COMPUTE)
        if TF32 and not UINT8:  # centred uint8 pixels are exact
            pixels = round_to_tf32(pixels)
        grad_ptrs = grad_ptr + (token * width)[:, None] + d[None, :]
        grad = tl.load(grad_ptrs, mask=valid[:, None] & (d < width)[None, :], other=0.0)
        if TF32:
            grad = round_to_tf32(grad)
        acc = tl.dot(grad.T, pixels, acc, input_precision=PRECISION)

    part = (split.to(tl.int64) * width + d) * k_length
    tl.store(parts_ptr + part[:, None] + k[None, :], acc, mask=(d < width)[:, None] & (k < k_length)[None, :])


forward_aligned = jit(_packed_forward)
forward_unaligned = jit(_packed_forward, any_address=["images_ptr", "positions_ptr"])
weight_gradient_aligned = jit(_packed_weight_gradient)
weight_gradient_unaligned = jit(_packed_weight_gradient, any_address=["images_ptr", "grad_ptr"])

FORWARD, WEIGHT = "packed_forward", "packed_weight_gradient"
ENTRIES = manifest.Entries(__name__)


def _specialisations() -> Iterator[tuple[str, ...]]:
    """The keys of the forward kernel: variant, image, compute, positions, out and precision."""
    for compute in manifest.HALF:
        for image in ("u8", compute):
            yield from (("wide", image, compute, table, compute, "ieee") for table in (compute, "fp32"))
            yield "wide", image, compute, "fp32", "fp32", "ieee"
        yield "wide", "fp32", compute, "fp32", compute, "ieee"
    for image in ("u8", "bf16"):
        yield "masked", image, "bf16", "fp32", "bf16", "ieee"
    yield "wide", "fp32", "fp32", "fp32", "fp32", "tf32"
    for image in IMAGES:
        for compute, precision in PRODUCTS:
            yield "generic", image, compute, "fp32", "fp32", precision


def _forward_registers(
    variant: str, image: str, compute: str, table: str, out: str, precision: str
) -> manifest.Registers:
    """Of a thread, at most: for two programs on a multiprocessor on the targets where that takes no stack."""
    if variant == "generic":
        return manifest.MOST_REGISTERS if compute == "fp32" else None
    fits = variant == "wide" and table == "fp32" and (image == "u8" or precision == "tf32")
    return {90: manifest.TWO_PROGRAMS} if fits else None


def _weight_registers(variant: str, image: str, compute: str, precision: str) -> manifest.Registers:
    """Of a thread, at most, likewise."""
    if variant == "generic":
        return manifest.MOST_REGISTERS if precision == "tf32" else None
    if image == compute:
        return {90: manifest.TWO_PROGRAMS} if variant == "wide" else None
    return dict.fromkeys((90, 100) if variant == "wide" else (90,), manifest.TWO_PROGRAMS)


for _key in _specialisations():
    _variant, _image, _compute, _table, _out, _precision = _key
    _generic = _variant == "generic"
    ENTRIES.add(
        FORWARD,
        _key,
        dict(images=_image, weight=_compute, table="fp32", positions=_table, normaliser="fp32", first="i64",
             origins="i64", places="i32", tokens=_out),
        dict(
            **VARIANTS[_variant].constants,
            # Values of 4 bytes: shorter steps, or they leave no room to prefetch.
            ROWS=2 if _precision == "tf32" and not _generic else VARIANTS[_variant].rows,
            MASKED=VARIANTS[_variant].masked,
            PRECISION=_precision,
            BLOCK_M=64 if _generic else 128,
            BLOCK_N=64 if _generic else 128,
            GROUP_M=8,
        ),
        4 if _generic else 8,
        3,
        function=f"forward_{manifest.alignment(not _generic)}",
        compute=_compute,
        copies=copies_of(_variant, _image, "weight"),
        max_registers=_forward_registers(*_key),
    )  # fmt: skip


def _add_weight_gradient(variant: str, image: str, compute: str, precision: str = "ieee") -> None:
    generic = variant == "generic"
    rows, stages = (32, 4) if image == "fp32" or (variant, image) == ("masked", "u8") else (64, 3)
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), (16, 64, 64) if generic else (rows, 128, 128), strict=True))
    constants = dict(**VARIANTS[variant].constants, MASKED=VARIANTS[variant].masked, PRECISION=precision, **blocks)
    ENTRIES.add(
        WEIGHT,
        (variant, image, compute, precision),
        dict(images=image, grad=compute, constants="fp32", origins="i64", places="i32", parts="fp32"),
        constants,
        num_warps=4 if generic else 8,
        num_stages=3 if generic else stages,
        function=f"weight_gradient_{manifest.alignment(not generic)}",
        compute=compute,
        product_rows="BLOCK_N",
        copies=copies_of(variant, image, "grad"),
        max_registers=_weight_registers(variant, image, compute, precision),
    )


for _compute in manifest.HALF:
    for _image in ("u8", _compute, "fp32"):
        _add_weight_gradient("wide", _image, _compute)
for _image in ("u8", "bf16"):
    _add_weight_gradient("masked", _image, "bf16")
for _compute, _precision in PRODUCTS:
    for _image in IMAGES:
        _add_weight_gradient("generic", _image, _compute, _precision)


def forward(
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    images: Sequence[Tensor],
    starts: Sequence[int],
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[C, H_i, W_i] each → [Σ R+N_i, D]; arguments as of the op, already checked."""
    width, prefix_rows = weight.shape[0], 0 if prefix is None else prefix.shape[0]
    if not images:
        return weight.new_empty((0, width), dtype=dtype)
    packed, weight, mean, std = _read(images, starts, weight, mean, std)
    batch = packed.layout.batch
    tokens_rows = packed.rows + batch * prefix_rows
    _check_sizes(tokens_rows, packed.positions, width)
    kernel_dtype = kernel_dtype_of(compute_dtype, dtype)
    positions = _positions(pos_embed, kernel_dtype)
    image, precision = packed.tensors[0], product_precision(compute_dtype)

    def find(variant: str) -> Entry | None:
        table = torch.float32 if positions is None or variant == "generic" else positions.dtype
        out = output_of(variant, kernel_dtype)
        return ENTRIES.find(FORWARD, variant, image.dtype, compute_dtype, table, out, precision)

    read = [packed.base] if positions is None else [packed.base, positions]
    plan = plan_for(find, packed.layout, width, read)
    entry, order, is_uint8 = plan.entry, plan.order, image.dtype == torch.uint8
    if positions is not None and entry.key[0] == "generic":
        positions = positions.float()
    rows = placed(packed, weight.device, prefix_rows, entry.constant("ALIGN"))
    tokens = image.new_empty((tokens_rows, width), dtype=output_of(entry.key[0], kernel_dtype))
    constants = channel_constants(mean, std, packed.layout.channels, image.dtype, compute_dtype, precision == "tf32")
    prepared = prepare(
        weight, constants, is_uint8, compute_dtype, packed.layout, order, prefix_rows + 1, bias, None, prefix
    )
    block_m, block_n = entry.constant("BLOCK_M"), entry.constant("BLOCK_N")
    tiles_m = cdiv(packed.rows, block_m) + cdiv(batch * prefix_rows, block_m)
    launch.launch(
        entry,
        (tiles_m * cdiv(width, block_n),),
        reads=packed.tensors,
        images_ptr=packed.base,
        weight_ptr=prepared.weight,
        table_ptr=prepared.table,
        positions_ptr=prepared.table if positions is None else positions,
        normaliser_ptr=prepared.normaliser,
        first_ptr=rows.table,
        origins_ptr=rows.origins,
        places_ptr=rows.places,
        tokens_ptr=tokens,
        rows=packed.rows,
        prefix_rows=batch * prefix_rows,
        prefix=prefix_rows,
        **_layout_arguments(packed, plan, width),
        row_blocks=order.row_blocks,
        steps=order.steps,
        has_positions=int(positions is not None),
    )
    return tokens.to(dtype)


def backward(
    grad: Tensor,
    weight: Tensor,
    images: Sequence[Tensor],
    starts: Sequence[int],
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    table_rows: int,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of images, weight, bias, and prefix and position rows; none of the images, or of size 0, where not
    needed. That of the images, which few train, is plain PyTorch's."""
    need_images, need_weight, need_bias, need_rows = needs
    given = grad, weight, images, starts, mean, std, compute_dtype, prefix_rows, table_rows
    if not images or not (need_weight or need_bias or need_rows):
        return plain.backward(*given, needs)
    d_images = plain.backward(*given, (True, False, False, False))[0] if need_images else []
    packed, kernel, mean, std = _read(images, starts, weight, mean, std)
    problem = ("patch_embed_packed", TRAINING, images[0].dtype, compute_dtype, grad.dtype, weight.shape, False)
    programs = configuration(grad.device, problem, packed.rows).programs or TARGET_PROGRAMS
    grad = supported(grad).contiguous()
    width, positions = weight.shape[0], max(packed.positions, table_rows)
    _check_sizes(grad.shape[0], positions, width)
    product_grad = grad.to(compute_dtype) if need_weight else grad
    plan = _weight_plan(packed, product_grad)
    rows = placed(packed, weight.device, prefix_rows, plan.entry.constant("ALIGN"))
    d_weight, d_bias = weight.new_empty(0), grad.new_empty(0, dtype=torch.float32)
    d_rows = None
    if need_rows or need_bias or (need_weight and mean is not None):
        d_rows = sum_positions(grad, packed, rows.table, prefix_rows, positions)
    if need_weight:
        places = rows.origins, rows.places
        parts, constants = _weight_parts(product_grad, packed, plan, *places, kernel, mean, std, programs)
        is_uint8 = packed.tensors[0].dtype == torch.uint8
        found, d_bias = reduce_parts(parts, d_rows, kernel, packed.layout, plan.order, constants, prefix_rows, is_uint8)
        d_weight = found.view(weight.shape)
    elif need_bias:
        assert d_rows is not None
        d_bias = sum_rows(d_rows[prefix_rows:])
    nothing = grad.new_empty(0, dtype=torch.float32)
    return (
        d_images,
        d_weight,
        d_bias if need_bias else nothing,
        d_rows[: prefix_rows + table_rows] if need_rows and d_rows is not None else nothing.clone(),
    )


def _weight_parts(
    grad: Tensor,
    packed: Images,
    plan: Plan,
    origins: Tensor,
    places: Tensor,
    weight: Tensor,
    mean: Normalisation,
    std: Normalisation,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """[splits, D, K] fp32, sums over slices of the rows, which about so many programs share: their number sets the
    order in which rows are added; and the constants that go with them."""
    layout, image, width = packed.layout, packed.tensors[0], weight.shape[0]
    tf32 = product_precision(grad.dtype) == "tf32"
    constants = constants_on_device(
        channel_constants(mean, std, layout.channels, image.dtype, grad.dtype, tf32), grad.device
    )
    block_m, block_n, block_k = plan.entry.tile
    tiles = cdiv(width, block_n) * cdiv(plan.order.length, block_k)
    splits = max(1, min(programs // tiles, cdiv(packed.rows, 4 * block_m)))
    rows_per_split = cdiv(cdiv(packed.rows, splits), block_m) * block_m
    splits = cdiv(packed.rows, rows_per_split)
    parts = torch.empty(splits, width, plan.order.length, dtype=torch.float32, device=grad.device)
    launch.launch(
        plan.entry,
        (tiles, splits),
        reads=packed.tensors,
        images_ptr=packed.base,
        grad_ptr=grad,
        constants_ptr=constants,
        origins_ptr=origins,
        places_ptr=places,
        parts_ptr=parts,
        channels=layout.channels,
        channels_last=int(layout.channels_last),
        rows=packed.rows,
        rows_per_split=rows_per_split,
        **_layout_arguments(packed, plan, width),
        padded_rows=plan.order.padded_rows,
        planes=plan.order.steps // plan.order.row_blocks,
    )
    return parts, constants


def _weight_plan(packed: Images, grad: Tensor) -> Plan:
    image, precision = packed.tensors[0], product_precision(grad.dtype)
    return plan_for(
        lambda variant: ENTRIES.find(WEIGHT, variant, image.dtype, grad.dtype, precision),
        packed.layout,
        grad.shape[-1],
        [packed.base, grad],
    )


def _layout_arguments(packed: Images, plan: Plan, width: int) -> dict[str, int]:
    return {
        "width_units": width // plan.entry.constant("WIDTH_ALIGN"),
        "stretch_units": packed.layout.stretch // plan.entry.constant("ALIGN"),
        "patch_height": packed.layout.patch_height,
        "runs": plan.order.runs,
    }


def _read(
    images: Sequence[Tensor], starts: Sequence[int], weight: Tensor, mean: Normalisation, std: Normalisation
) -> tuple[Images, Tensor, Normalisation, Normalisation]:
    """Images, weight, mean and std as the kernels take them; patches that are cut already as images of rows, where one
    mean and one std hold for all of their values."""
    packed = read_images(images, starts, (weight.shape[2], weight.shape[3]))
    folded = packed.folded() if all(values is None or len(set(values)) == 1 for values in (mean, std)) else None
    if folded is None:
        return packed, weight, mean, std
    layout = folded.layout
    weight = weight.reshape(weight.shape[0], 1, layout.patch_height, layout.patch_width)
    mean, std = (None if values is None else values[:1] for values in (mean, std))
    return folded, weight, mean, std


def _positions(pos_embed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The table in `dtype` or in fp32, whichever it has."""
    if pos_embed is None:
        return None
    return pos_embed.to(pos_embed.dtype if pos_embed.dtype == dtype else torch.float32).contiguous()


def _check_sizes(tokens: int, positions: int, width: int) -> None:
    if max(tokens, positions) >= INT32_LIMIT:
        raise ValueError(f"images: {tokens} tokens and {positions} positions; there must be less than 2^31 of each")


# Calls that stand for the op where launches are counted: 64 uint8 images of eight shapes for ViT-B/16, in bfloat16,
# with fp32 parameters, a class token, and positions of a grid of 16 x 16 for each shape.
GRIDS = ((14, 14), (10, 20), (20, 10), (7, 28), (16, 12), (12, 16), (9, 21), (25, 8)) * 8


def _example() -> tuple[list[Tensor], Tensor, list[int]]:
    images = [torch.empty(3, 16 * rows, 16 * columns, dtype=torch.uint8, device="meta") for rows, columns in GRIDS]
    first = {grid: sum(rows * columns for rows, columns in GRIDS[:i]) for i, grid in enumerate(GRIDS[:8])}
    return images, torch.empty(768, 3, 16, 16, device="meta"), [first[grid] for grid in GRIDS]


def _example_forward() -> Tensor:
    images, weight, starts = _example()
    bias, prefix, table = weight.new_empty(768), weight.new_empty(1, 768), weight.new_empty(16, 16, 768)
    positions = grids.gathered(table, GRIDS[:8], grids.Filter())
    settings = [0.5] * 3, [0.5] * 3, torch.bfloat16, torch.bfloat16
    return forward(weight, bias, positions, prefix, images, starts, *settings)


def _example_backward() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    images, weight, starts = _example()
    patches = sum(rows * columns for rows, columns in GRIDS)
    grad = weight.new_empty(patches + len(images), 768, dtype=torch.bfloat16)
    settings = [0.5] * 3, [0.5] * 3, torch.bfloat16, 1, patches // 8
    return backward(grad, weight, images, starts, *settings, (False, True, True, True))


CALLS = {
    "patch_embed_packed forward, 64 images": _example_forward,
    "patch_embed_packed backward of all parameters": _example_backward,
}
