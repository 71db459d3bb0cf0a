"""The backward kernels: weight gradient by split-K over rebuilt patches, image gradient, and the reduction of parts.

d_weight'[d, k] = sum_m grad[m, d] * (pixel[m, k] - shift[k]) * scale[k]         in slices over m, summed in order
d_row[r, d]     = sum_b grad[b, r, d]                                             beside it
d_bias[d]       = sum_r d_row[r, d]                                               with the reduction, r >= R
d_image[m, k]   = sum_d grad[m, d] * weight[d, k] * scale[k]
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvit.kernels import manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import IMAGES, PRODUCTS, VARIANTS, copies_of
from fastvit.kernels.precision import round_to_tf32


@triton.jit
def columns_of(k, padded_rows, planes, runs, channels, channels_last, RUN: tl.constexpr):
    """Where each k lies in a patch: in which of the channels that lie apart, row, and place in that row, which decide
    whether k is padding; and its channel."""
    column = k % RUN
    stretch_row = k // RUN
    plane = stretch_row // padded_rows
    row = stretch_row - plane * padded_rows
    plane = tl.minimum(plane, planes - 1)  # past the last one: somewhere inside the image, never used
    apart = plane // runs
    place = (plane - apart * runs) * RUN + column
    return apart, row, place, tl.where(channels_last != 0, place % channels, apart)


@triton.jit
def _add_rows(
    grad_ptr, row_sums_ptr, images, columns, share, shares, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """One of `shares` equal shares of the sum over all images of grad, [images, columns]."""
    for tile in range(share, tl.cdiv(columns, BLOCK_COLUMNS), shares):
        column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for row_start in range(0, images, BLOCK_ROWS):
            row = row_start + tl.arange(0, BLOCK_ROWS)
            values_ptr = grad_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
            values = tl.load(values_ptr, mask=(row < images)[:, None] & (column < columns)[None, :], other=0.0)
            sums += values.to(tl.float32)
        tl.store(row_sums_ptr + column, tl.sum(sums, axis=0), mask=column < columns)


def _patch_embed_weight_gradient(
    images_ptr,  # [B, C, H, W], any of the layouts of layout.py
    grad_ptr,  # [B, R+kept, D] in the compute dtype
    constants_ptr,  # [4, C] fp32: the fields of ChannelConstants; read only where images must be converted
    keep_ptr,  # [B, kept] int64, read only with HAS_KEEP
    parts_ptr,  # [splits, D, K] fp32
    row_sums_ptr,  # [R+kept, D] fp32: grad summed over images
    images: tl.int32,  # B; 0 where row_sums are not wanted
    channels: tl.int32,
    channels_last: tl.int32,
    rows: tl.int32,  # B * kept
    rows_per_split: tl.int32,  # a multiple of BLOCK_M
    kept: tl.int32,
    patches: tl.int32,  # N
    prefix: tl.int32,  # R
    grid_width: tl.int32,
    width_units: tl.int32,  # D
    batch_stride_units: tl.int64,
    channel_stride_units: tl.int32,
    row_stride_units: tl.int32,
    stretch_units: tl.int32,
    patch_height: tl.int32,
    runs: tl.int32,
    padded_rows: tl.int32,
    planes: tl.int32,  # K = planes * padded_rows * RUN
    HAS_KEEP: tl.constexpr,  # not a scalar: a load inside the loop that others wait for keeps them from being pipelined
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
):
    COMPUTE: tl.constexpr = grad_ptr.dtype.element_ty
    TF32: tl.constexpr = PRECISION == "tf32"
    CONVERT: tl.constexpr = images_ptr.dtype.element_ty != grad_ptr.dtype.element_ty or TF32
    UINT8: tl.constexpr = images_ptr.dtype.element_ty == tl.uint8
    width = width_units * WIDTH_ALIGN
    row_stride = row_stride_units * ALIGN
    stretch = stretch_units * ALIGN
    k_length = planes * padded_rows * RUN

    # Half of the programs sum rows before their product, which memory bounds, while the other half, on the same
    # multiprocessors, is busy with its products.
    split = tl.program_id(1)
    share = split * tl.num_programs(0) + tl.program_id(0)
    shares = tl.cdiv(tl.num_programs(0) * tl.num_programs(1), 2)
    if (share < shares) & (images > 0):
        _add_rows(grad_ptr, row_sums_ptr, images, (prefix + kept) * width, share, shares, SUM_ROWS, SUM_COLUMNS)

    tiles_k = tl.cdiv(k_length, BLOCK_K)
    tile_n = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) - tile_n * tiles_k
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    apart, row, place, channel = columns_of(k, padded_rows, planes, runs, channels, channels_last, RUN)
    offset = apart * (channel_stride_units * ALIGN) + row * row_stride + place
    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if CONVERT:
        shift = tl.load(constants_ptr + channels + channel)

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    start = split * rows_per_split
    if HAS_KEEP:
        next_kept = tl.load(keep_ptr + tl.minimum(start + tl.arange(0, BLOCK_M), rows - 1))
    for m_start in range(start, tl.minimum(start + rows_per_split, rows), BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        m_safe = tl.minimum(m, rows - 1)
        batch = m_safe // kept
        index = m_safe - batch * kept
        valid = m < rows
        patch = index
        if HAS_KEEP:  # known one step ahead, so that the loads of the pixels need not wait for it
            valid = valid & (next_kept >= 0) & (next_kept < patches)
            patch = tl.where(valid, next_kept, 0).to(tl.int32)
            next_kept = tl.load(keep_ptr + tl.minimum(m + BLOCK_M, rows - 1))
        grid_y = patch // grid_width
        grid_x = patch - grid_y * grid_width
        patch_offset = batch.to(tl.int64) * (batch_stride_units.to(tl.int64) * ALIGN) + (
            grid_y * (patch_height * row_stride) + grid_x * stretch
        )
        image_ptrs = images_ptr + patch_offset[:, None] + offset[None, :]
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
        token = batch.to(tl.int64) * (kept + prefix) + (index + prefix)
        grad_ptrs = grad_ptr + (token * width)[:, None] + d[None, :]
        grad = tl.load(grad_ptrs, mask=valid[:, None] & (d < width)[None, :], other=0.0)
        if TF32:
            grad = round_to_tf32(grad)
        acc = tl.dot(grad.T, pixels, acc, input_precision=PRECISION)

    part = (split.to(tl.int64) * width + d) * k_length
    tl.store(parts_ptr + part[:, None] + k[None, :], acc, mask=(d < width)[:, None] & (k < k_length)[None, :])


weight_gradient_aligned = jit(_patch_embed_weight_gradient, any_address=["keep_ptr"])
weight_gradient_unaligned = jit(_patch_embed_weight_gradient, any_address=["keep_ptr", "images_ptr", "grad_ptr"])


@jit
def reduce_weight_gradient(
    parts_ptr,  # [splits, D, k_length] fp32
    constants_ptr,  # [4, C] fp32: see prepare_weight.py
    row_sums_ptr,  # [R+patches, D] fp32: grad summed over images; read only with patches
    bias_gradient_ptr,  # [D] fp32: their sum, written only with patches
    gradient_ptr,  # [D, C, P_h, P_w]
    width: tl.int32,
    channels: tl.int32,
    patch_height: tl.int32,
    patch_width: tl.int32,
    k_length: tl.int32,
    padded_rows: tl.int32,
    runs: tl.int32,
    splits: tl.int32,
    channels_last: tl.int32,
    prefix: tl.int32,  # R
    patches: tl.int32,  # 0 where neither the bias nor a mean needs them
    inverse_factor: tl.float32,  # 1/256 for uint8, else 1
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Adds the parts in order and turns the gradient of W' (x - z) into that of W (x - mean) / std."""
    size = channels * patch_height * patch_width
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)  # place in the flattened (C, P_h, P_w)
    inside = (d < width)[:, None] & (e < size)[None, :]
    channel = e // (patch_height * patch_width)
    row = e // patch_width - channel * patch_height
    x = e % patch_width
    place = tl.where(channels_last != 0, x * channels + channel, x)
    plane = tl.where(channels_last != 0, 0, channel * runs) + place // RUN
    k = (plane * padded_rows + row) * RUN + place % RUN

    total = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    for split in range(0, splits):
        part = (d + split * width).to(tl.int64) * k_length
        total += tl.load(parts_ptr + part[:, None] + k[None, :], mask=inside, other=0.0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for row_start in range(0, patches, BLOCK_ROWS):
        patch = row_start + tl.arange(0, BLOCK_ROWS)
        row_sums_ptrs = row_sums_ptr + (prefix + patch).to(tl.int64)[:, None] * width + d[None, :]
        sums += tl.load(row_sums_ptrs, mask=(patch < patches)[:, None] & (d < width)[None, :], other=0.0)
    bias_gradient = tl.sum(sums, axis=0)
    tl.store(bias_gradient_ptr + d, bias_gradient, mask=(d < width) & (patches > 0) & (tl.program_id(1) == 0))
    weight_scale = tl.load(constants_ptr + channel, mask=e < size, other=0.0) * inverse_factor
    bias_shift = tl.load(constants_ptr + 2 * channels + channel, mask=e < size, other=0.0)
    gradient = (total + bias_gradient[:, None] * bias_shift[None, :]) * weight_scale[None, :]
    gradient_ptrs = gradient_ptr + d.to(tl.int64)[:, None] * size + e[None, :]
    tl.store(gradient_ptrs, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def _patch_embed_image_gradient(
    grad_ptr,  # [B, R+N, D] in the compute dtype
    weight_ptr,  # [D, K] in the compute dtype, in the order of layout.py
    constants_ptr,  # [4, C] fp32: the fields of ChannelConstants, of which the scale plays a part
    images_ptr,  # [B, C, H, W]: the gradient, every value of which is written once
    channels: tl.int32,
    channels_last: tl.int32,
    rows: tl.int32,  # B * N
    patches: tl.int32,  # N
    prefix: tl.int32,  # R
    grid_width: tl.int32,
    width_units: tl.int32,  # D
    batch_stride_units: tl.int64,
    channel_stride_units: tl.int32,
    row_stride_units: tl.int32,
    stretch_units: tl.int32,
    patch_height: tl.int32,
    runs: tl.int32,
    padded_rows: tl.int32,
    planes: tl.int32,
    RUN: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    width = width_units * WIDTH_ALIGN
    row_stride = row_stride_units * ALIGN
    stretch = stretch_units * ALIGN
    k_length = planes * padded_rows * RUN

    tiles_k = tl.cdiv(k_length, BLOCK_K)
    tile_m = tl.program_id(0) // tiles_k
    tile_k = tl.program_id(0) - tile_m * tiles_k
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_safe = tl.minimum(m, rows - 1)
    batch = m_safe // patches
    token = batch.to(tl.int64) * (patches + prefix) + (m_safe - batch * patches + prefix)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_N)
    grad_ptrs = grad_ptr + (token * width)[:, None] + d[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for d_start in range(0, width, BLOCK_N):
        grad = tl.load(grad_ptrs + d_start, mask=(d < width - d_start)[None, :], other=0.0)
        d_safe = tl.minimum(d_start + d, width - 1)
        weight_ptrs = weight_ptr + d_safe.to(tl.int64)[:, None] * k_length + k[None, :]
        weight = tl.load(weight_ptrs, mask=(k < k_length)[None, :], other=0.0)
        if PRECISION == "tf32":
            grad = round_to_tf32(grad)
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)

    patch = m - m // patches * patches
    grid_y = patch // grid_width
    grid_x = patch - grid_y * grid_width
    patch_offset = (m // patches).to(tl.int64) * (batch_stride_units.to(tl.int64) * ALIGN) + (
        grid_y * (patch_height * row_stride) + grid_x * stretch
    )
    apart, row, place, channel = columns_of(k, padded_rows, planes, runs, channels, channels_last, RUN)
    offset = apart * (channel_stride_units * ALIGN) + row * row_stride + place
    acc = acc * tl.load(constants_ptr + 3 * channels + channel)[None, :]
    inside = (k < k_length) & (place < stretch) & (row < patch_height)
    image_ptrs = images_ptr + patch_offset[:, None] + offset[None, :]
    tl.store(image_ptrs, acc.to(images_ptr.dtype.element_ty), mask=(m < rows)[:, None] & inside[None, :])


image_gradient_aligned = jit(_patch_embed_image_gradient)
image_gradient_unaligned = jit(_patch_embed_image_gradient, any_address=["grad_ptr", "images_ptr"])


WEIGHT, IMAGE, REDUCE = "patch_embed_weight_gradient", "patch_embed_image_gradient", "reduce_weight_gradient"
ENTRIES = manifest.Entries(__name__)


@dataclass(frozen=True)
class Tile:
    """Of the weight gradient: rows a step, of D, of K; and how deep loads are prefetched."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def _tiles(variant: str, image: str, compute: str) -> dict[str, Tile]:
    if variant == "generic":
        return {"generic": Tile(16, 64, 64, 4, 3)}
    # 64 rows of fp32, or of masked bytes, leave no registers for a second program.
    rows, stages = (32, 4) if image == "fp32" or (variant, image) == ("masked", "u8") else (64, 3)
    tiles = {"medium": Tile(rows, 128, 128, 8, stages)}
    if variant == "wide" and image != "fp32" and compute == "bf16":  # one program, but less to read a product
        tiles["large"] = Tile(64, 128, 256, 8, 3)
    return tiles


def _registers(variant: str, precision: str) -> manifest.Registers:
    """Of a thread, at most: for two programs on a multiprocessor on the targets where that takes no stack."""
    if (variant, precision) == ("generic", "tf32"):
        return manifest.MOST_REGISTERS  # ptxas would spill some bytes for the sake of one more program
    return {90: manifest.TWO_PROGRAMS} if variant == "masked" else None


def _add_weight_gradient(variant_name: str, image: str, compute: str, precision: str = "ieee") -> None:
    variant, generic = VARIANTS[variant_name], variant_name == "generic"
    for tile_name, tile in _tiles(variant_name, image, compute).items():
        for keep in ("", "keep"):
            blocks = dict(BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, SUM_ROWS=32, SUM_COLUMNS=tile.warps * 32)
            ENTRIES.add(
                WEIGHT,
                (variant_name, tile_name, image, compute, precision, keep),
                dict(images=image, grad=compute, constants="fp32", keep="i64", parts="fp32", row_sums="fp32"),
                dict(HAS_KEEP=bool(keep), **variant.constants, MASKED=variant.masked, PRECISION=precision, **blocks),
                num_warps=tile.warps,
                num_stages=tile.stages,
                function=f"weight_gradient_{manifest.alignment(not generic)}",
                compute=compute,
                product_rows="BLOCK_N",
                copies=copies_of(variant_name, image, "grad"),
                max_registers=_registers(variant_name, precision),
                targets=(90,) if tile_name == "large" else manifest.TARGETS,  # others have no registers for it
            )


def _add_image_gradient(variant_name: str, image: str, compute: str, precision: str = "ieee") -> None:
    generic = variant_name == "generic"
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), (64, 32, 64) if generic else (128, 64, 128), strict=True))
    ENTRIES.add(
        IMAGE,
        (variant_name, image, compute, precision),
        dict(grad=compute, weight=compute, constants="fp32", images=image),
        dict(**VARIANTS[variant_name].constants, PRECISION=precision, **blocks),
        num_warps=4 if generic else 8,
        num_stages=3,
        function=f"image_gradient_{manifest.alignment(not generic)}",
        compute=compute,
        copies=copies_of(variant_name, image, "grad", "weight"),
    )


for _compute in manifest.HALF:
    for _image in ("u8", _compute, "fp32"):
        _add_weight_gradient("wide", _image, _compute)
    for _image in (_compute, "fp32"):
        _add_image_gradient("wide", _image, _compute)
for _image in ("u8", "bf16", "fp32"):
    _add_weight_gradient("narrow", _image, "bf16")
    _add_weight_gradient("masked", _image, "bf16")
for _compute, _precision in PRODUCTS:
    for _image in IMAGES:
        _add_weight_gradient("generic", _image, _compute, _precision)
    _add_image_gradient("generic", "fp32", _compute, _precision)
for _dtype in manifest.FLOATS:
    for _run in (16, 8):
        ENTRIES.add(
            REDUCE,
            (_dtype, f"run{_run}"),
            dict(parts="fp32", constants="fp32", row_sums="fp32", bias_gradient="fp32", gradient=_dtype),
            dict(RUN=_run, BLOCK_D=16, BLOCK_E=256, BLOCK_ROWS=64),
        )
