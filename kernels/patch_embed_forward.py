"""The forward kernel: an implicit GEMM straight from the image to the finished token sequence.

    tokens[b, R+j] = table[R+n] + sum_k (pixel[b, n, k] - shift[k]) * scale[k] * weight[:, k]     n = keep[b, j], or j
    tokens[b, r]   = table[r]                                                                      r < R

The table [R+N, D] holds what is added to every image alike: bias, position and prefix rows. The accumulator starts
from it, which costs fewer registers than adding it at the end. Prefix rows are tiles without a reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastvit.kernels import manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import IMAGES, PRODUCTS, VARIANTS, copies_of
from fastvit.kernels.manifest import Entry
from fastvit.kernels.precision import round_to_tf32


@triton.jit
def _place(m, images, together):
    """The image of each row, and the place among its patches: some of the first image, as many of the second, and so on
    to the last one, then the next ones of the first."""
    turn = m // (images * together)
    in_turn = m - turn * (images * together)
    batch = in_turn // together
    return batch, turn * together + in_turn - batch * together


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tiles run over D first within groups of GROUP_M, so that an image is fetched once and the weight stays in L2."""
    group = program // (GROUP_M * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = program - group * (GROUP_M * tiles_n)
    return group * GROUP_M + in_group % group_size, in_group // group_size


@triton.jit
def as_multiplied(
    pixels,
    normaliser_ptr,
    shift_start,
    scale_start,
    k,
    CONVERT: tl.constexpr,
    TF32: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Pixels [BLOCK_M, BLOCK_K] normalised and rounded, where they are not multiplied as they are."""
    UINT8: tl.constexpr = pixels.dtype == tl.uint8
    if CONVERT:
        pixels = pixels.to(tl.float32) - tl.load(normaliser_ptr + shift_start + k)[None, :]
        if not UINT8:  # the scale of uint8 is in the weight
            pixels = pixels * tl.load(normaliser_ptr + scale_start + k)[None, :]
        pixels = pixels.to(COMPUTE)
    if TF32 and not UINT8:  # centred uint8 pixels are exact
        pixels = round_to_tf32(pixels)
    return pixels


@triton.jit
def store_tokens(tokens_ptr, token, acc, stored, d_start, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile [BLOCK_M, BLOCK_N] of sums to rows `token`, where `stored`, from column d_start on."""
    token_ptrs = tokens_ptr + (token * width)[:, None]
    if BLOCK_N >= 128:
        # Half a tile at a time. The whole of it takes more registers than there are, or than let two programs share a
        # multiprocessor, of which one computes while the other loads its table or stores.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        d_left = d_start + tl.arange(0, BLOCK_N // 2)
        d_right = d_left + BLOCK_N // 2
        tl.store(
            token_ptrs + d_left[None, :],
            left.to(tokens_ptr.dtype.element_ty),
            mask=stored[:, None] & (d_left < width)[None, :],
        )
        tl.store(
            token_ptrs + d_right[None, :],
            right.to(tokens_ptr.dtype.element_ty),
            mask=stored[:, None] & (d_right < width)[None, :],
        )
    else:
        d = d_start + tl.arange(0, BLOCK_N)
        tl.store(
            token_ptrs + d[None, :], acc.to(tokens_ptr.dtype.element_ty), mask=stored[:, None] & (d < width)[None, :]
        )


# Sizes and strides come in units of ALIGN (or WIDTH_ALIGN) elements. The kernel multiplies them back and so knows
# what divides them, without Triton specialising on their values: one compilation serves every batch and image size.
def _patch_embed_forward(
    images_ptr,  # [B, C, H, W], any of the layouts of layout.py
    weight_ptr,  # [D, steps * BLOCK_K] in the order of layout.py, in the compute dtype
    table_ptr,  # [R+N, D] fp32
    normaliser_ptr,  # [2, steps * BLOCK_K] fp32: shift, scale; read only where images must be converted
    keep_ptr,  # [B, kept] int64, read only with has_keep
    tokens_ptr,  # [B, R+kept, D]
    rows: tl.int32,  # B * kept
    prefix_rows: tl.int32,  # B * R
    kept: tl.int32,  # projected patches of an image: N, or the width of keep
    images: tl.int32,  # B
    together: tl.int32,  # patches of an image whose rows follow each other before the next image's do; divides kept
    patches: tl.int32,  # N
    prefix: tl.int32,  # R
    grid_width: tl.int32,  # patches in a row of patches
    width_units: tl.int32,  # D
    batch_stride_units: tl.int64,
    channel_stride_units: tl.int32,
    row_stride_units: tl.int32,
    stretch_units: tl.int32,
    patch_height: tl.int32,
    runs: tl.int32,
    row_blocks: tl.int32,
    steps: tl.int32,
    has_keep: tl.int32,
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
    row_stride = row_stride_units * ALIGN
    channel_stride = channel_stride_units * ALIGN
    stretch = stretch_units * ALIGN

    patch_tiles = tl.cdiv(rows, BLOCK_M)
    tiles_m = patch_tiles + tl.cdiv(prefix_rows, BLOCK_M)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(width, BLOCK_N), GROUP_M)

    is_prefix = tile_m >= patch_tiles
    total = tl.where(is_prefix, prefix_rows, rows)
    first_row = tl.where(is_prefix, 0, prefix)
    m = (tile_m - tl.where(is_prefix, patch_tiles, 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one, which needs no mask in the loop; only the store is masked.
    m_safe = tl.minimum(m, total - 1)
    batch, index = _place(m_safe, images, tl.where(is_prefix, prefix, together))
    patch = tl.load(keep_ptr + m_safe, mask=(has_keep != 0) & (is_prefix == 0) & (m_safe >= 0), other=index)
    valid = is_prefix | ((patch >= 0) & (patch < patches))
    patch = tl.where(valid, patch, 0).to(tl.int32)

    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_safe = tl.minimum(d, width - 1)
    acc = tl.load(table_ptr + ((patch + first_row) * width)[:, None] + d[None, :], mask=(d < width)[None, :], other=0.0)
    acc = tl.where(valid[:, None], acc, float("nan"))

    grid_y = patch // grid_width
    grid_x = patch - grid_y * grid_width
    patch_offset = batch.to(tl.int64) * (batch_stride_units.to(tl.int64) * ALIGN) + (
        grid_y * (patch_height * row_stride) + grid_x * stretch
    )
    k = tl.arange(0, BLOCK_K)
    row_in_step = k // RUN
    column = k % RUN
    image_ptrs = images_ptr + patch_offset[:, None] + (row_in_step * row_stride + column)[None, :]
    weight_ptrs = weight_ptr + (d_safe.to(tl.int64) * (steps * BLOCK_K))[:, None] + k[None, :]
    for step in range(0, tl.where(is_prefix, 0, steps)):
        plane = step // row_blocks
        channel = plane // runs
        run_start = (plane - channel * runs) * RUN
        row_start = (step - plane * row_blocks) * ROWS
        offset = channel * channel_stride + row_start * row_stride + run_start
        if MASKED:
            inside = (column < stretch - run_start) & (row_in_step < patch_height - row_start)
            pixels = tl.load(image_ptrs + offset, mask=inside[None, :], other=0)
        else:
            pixels = tl.load(image_ptrs + offset)
        pixels = as_multiplied(
            pixels, normaliser_ptr, step * BLOCK_K, (steps + step) * BLOCK_K, k, CONVERT, TF32, COMPUTE
        )
        weight = tl.load(weight_ptrs + step * BLOCK_K)
        acc = tl.dot(pixels, weight.T, acc, input_precision=PRECISION)

    if UINT8:
        acc = acc * 0.00390625  # 1/256: the weights of uint8 images are scaled up by 256, see prepare_weight.py
    # Computed anew from m rather than from m_safe, so that the compiler does not keep these rows alive, one register
    # pair each, throughout the loop.
    batch_end, index_end = _place(m, images, tl.where(is_prefix, prefix, together))
    token = batch_end.to(tl.int64) * (kept + prefix) + (index_end + first_row)
    store_tokens(tokens_ptr, token, acc, m < total, tile_n * BLOCK_N, width, BLOCK_M, BLOCK_N)


# `aligned` may rely on 16-byte aligned tensors, `unaligned` takes images at any address; keep is the caller's too.
aligned = jit(_patch_embed_forward, any_address=["keep_ptr"])
unaligned = jit(_patch_embed_forward, any_address=["keep_ptr", "images_ptr"])

KERNEL = "patch_embed_forward"
MINIMUM_WAVE = 132  # programs that keep an H200 busy; a large tile is only worth it with at least as many


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    warps: int
    stages: int
    rows: int | None = None  # of a patch in a step, where not those of the variant


TILES = {
    "large": Tile(128, 256, 8, 3),
    "medium": Tile(128, 128, 8, 3),
    "small": Tile(64, 128, 4, 3),
    "tf32": Tile(128, 128, 8, 4, rows=2),  # values of 4 bytes: shorter steps, or they leave no room to prefetch
    "generic": Tile(64, 64, 4, 3),
}


def _specialisations() -> Iterator[tuple[str, ...]]:
    """The keys: variant, tile, image, compute, out and precision."""
    for compute in manifest.HALF:
        for image in ("u8", compute, "fp32"):
            for out in (compute, "fp32"):
                yield "wide", "medium", image, compute, out, "ieee"
    for image in ("u8", "bf16"):  # fp32 images at this tile take more registers than there are on sm_100
        yield "wide", "large", image, "bf16", "bf16", "ieee"
    for image in ("u8", "bf16", "fp32"):
        yield "wide", "small", image, "bf16", "bf16", "ieee"
        for out in ("bf16", "fp32"):
            yield "narrow", "medium", image, "bf16", out, "ieee"
            yield "masked", "medium", image, "bf16", out, "ieee"
    # uint8 images go to the generic kernels here: Triton would copy them 4 bytes at a time.
    yield "wide", "tf32", "fp32", "fp32", "fp32", "tf32"
    for image in IMAGES:
        for compute, precision in PRODUCTS:
            yield "generic", "generic", image, compute, "fp32", precision


def _registers(variant: str, tile: str, image: str, compute: str) -> manifest.Registers:
    """Of a thread, at most: for two programs on a multiprocessor on the targets where that takes no stack."""
    # ptxas would spill some bytes for the sake of one more program.
    if variant == "generic" and compute == "fp32":
        return manifest.MOST_REGISTERS
    if (variant, image) == ("masked", "u8"):
        return {100: manifest.MOST_REGISTERS}
    if tile != "medium" or image == "u8" or (variant, image) == ("masked", "fp32"):
        return None
    target = 80 if image == compute and variant != "masked" else 90
    return {target: manifest.TWO_PROGRAMS}


ENTRIES = manifest.Entries(__name__)
for _key in _specialisations():
    _variant, _tile, _image, _compute, _out, _precision = _key
    ENTRIES.add(
        KERNEL,
        _key,
        dict(images=_image, weight=_compute, table="fp32", normaliser="fp32", keep="i64", tokens=_out),
        dict(
            **VARIANTS[_variant].constants,
            ROWS=TILES[_tile].rows or VARIANTS[_variant].rows,
            MASKED=VARIANTS[_variant].masked,
            PRECISION=_precision,
            BLOCK_M=TILES[_tile].m,
            BLOCK_N=TILES[_tile].n,
            GROUP_M=8,
        ),
        TILES[_tile].warps,
        TILES[_tile].stages,
        function="unaligned" if _variant == "generic" else "aligned",
        compute=_compute,
        copies=copies_of(_variant, _image, "weight"),
        max_registers=_registers(_variant, _tile, _image, _compute),
    )


def tiles_for(
    variant: str, image: torch.dtype, compute: torch.dtype, out: torch.dtype, precision: str, width: int
) -> dict[str, Entry]:
    """The entries between which a GEMM of width D can choose, by the name of their tile, largest first."""
    found = {
        name: ENTRIES.find(KERNEL, variant, name, image, compute, out, precision)
        for name, tile in TILES.items()
        if name != "large" or width % tile.n == 0
    }
    return {name: entry for name, entry in found.items() if entry is not None}


def entry_for(
    variant: str,
    image: torch.dtype,
    compute: torch.dtype,
    out: torch.dtype,
    precision: str,
    rows: int,
    width: int,
    tile: str | None = None,
) -> Entry | None:
    """The entry for a GEMM of [rows, D = width]; None where the variant has none.

    That of the preferred `tile` where the variant has it, else one chosen by shape alone.
    """
    tiles = tiles_for(variant, image, compute, out, precision, width)
    if tile in tiles:
        return tiles[tile]
    smallest = tiles.get("small")
    for entry in tiles.values():
        programs = -(-rows // entry.constant("BLOCK_M")) * -(-width // entry.constant("BLOCK_N"))
        if programs >= MINIMUM_WAVE or smallest is None or entry is smallest:
            return entry
    return None
