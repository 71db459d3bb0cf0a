"""Rows of a packed sequence: which image each belongs to, where its patch lies, and sums over those of one position.

Images of any sizes stand one behind the other: patch row m is patch m - FIRST[i] of image i, whose token is row
m + (i + 1) * R of the sequence. What follows for each row from the images' table (packed_images.py) is found on the
device, by bisection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import cdiv
from fastvit.kernels.packed_images import Images
from fastvit.transfer import to_device


@triton.jit
def _at_most(sorted_ptr, count, key, halvings):
    """How many of `count` sorted numbers are at most `key`; halvings: bits that `count` takes."""
    found = key * 0
    for halving in range(0, halvings):
        tried = found + (1 << (halvings - 1 - halving))
        number = tl.load(sorted_ptr + tried - 1, mask=tried <= count, other=0)
        found = tl.where((tried <= count) & (number <= key), tried, found)
    return found


@jit
def place_rows(
    table_ptr,  # [8, B] int64: the rows of Images.table
    origins_ptr,  # [rows] int64: where each row's patch starts, in units of ALIGN elements from the lowest image on
    places_ptr,  # [4, rows] int32: its channel and row strides in these units, its position, and its token
    images: tl.int32,  # B
    halvings: tl.int32,  # bits that B takes
    rows: tl.int32,
    prefix: tl.int32,  # R
    patch_height: tl.int32,
    stretch_units: tl.int32,
    BLOCK_M: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < rows
    image = _at_most(table_ptr, images, tl.minimum(m, rows - 1), halvings) - 1
    index = m - tl.load(table_ptr + image).to(tl.int32)
    grid_width = tl.load(table_ptr + 4 * images + image).to(tl.int32)
    row_stride = tl.load(table_ptr + 3 * images + image)
    grid_y = index // grid_width
    grid_x = index - grid_y * grid_width
    origin = tl.load(table_ptr + images + image) + grid_y * (patch_height * row_stride) + grid_x * stretch_units
    tl.store(origins_ptr + m, origin, mask=inside)
    tl.store(places_ptr + m, tl.load(table_ptr + 2 * images + image).to(tl.int32), mask=inside)
    places_ptr += rows
    tl.store(places_ptr + m, row_stride.to(tl.int32), mask=inside)
    places_ptr += rows
    tl.store(places_ptr + m, tl.load(table_ptr + 5 * images + image).to(tl.int32) + index, mask=inside)
    places_ptr += rows
    tl.store(places_ptr + m, m + (image + 1) * prefix, mask=inside)


def _sum_positions(
    grad_ptr,  # [rows + B*R, D]
    table_ptr,  # [8, B] int64: the rows of Images.table
    sums_ptr,  # [R+P, D] fp32
    images: tl.int32,  # B
    halvings: tl.int32,  # bits that B takes
    rows: tl.int32,  # patches of all images
    longest: tl.int32,  # patches of an image, at most
    positions: tl.int32,  # P
    prefix: tl.int32,  # R
    width_units: tl.int32,  # D
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program sums a row of the prefix over all images, or some positions over the images that have them, in the
    order of the images' first positions."""
    width = width_units * ALIGN
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    row = tl.program_id(0)
    if row < prefix:
        for start in range(0, images, BLOCK_ROWS):
            image = start + tl.arange(0, BLOCK_ROWS)
            token = tl.load(table_ptr + image, mask=image < images, other=0) + image * prefix + row
            values_ptr = grad_ptr + (token * width)[:, None] + d[None, :]
            inside = (image < images)[:, None] & (d < width)[None, :]
            sums += tl.load(values_ptr, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums_ptr + row.to(tl.int64) * width + d, tl.sum(sums, axis=0), mask=d < width)
    else:
        first = (row - prefix) * BLOCK_ROWS
        position = first + tl.arange(0, BLOCK_ROWS)
        starts_ptr = table_ptr + 7 * images
        low = _at_most(starts_ptr, images, first - longest, halvings)  # images that end before these positions
        high = _at_most(starts_ptr, images, first + BLOCK_ROWS - 1, halvings)
        for place in range(low, high):
            image = tl.load(table_ptr + 6 * images + place)
            first_patch = tl.load(table_ptr + image)
            is_last = image == images - 1
            end = tl.where(is_last, rows, tl.load(table_ptr + image + 1, mask=is_last == 0, other=0))
            index = position - tl.load(table_ptr + 5 * images + image)
            token = first_patch + (image + 1) * prefix + index
            inside = (index >= 0) & (index < end - first_patch) & (position < positions)
            values_ptr = grad_ptr + (token * width)[:, None] + d[None, :]
            values = tl.load(values_ptr, mask=inside[:, None] & (d < width)[None, :], other=0.0)
            sums += values.to(tl.float32)
        sums_ptrs = sums_ptr + ((prefix + position).to(tl.int64) * width)[:, None] + d[None, :]
        tl.store(sums_ptrs, sums, mask=(position < positions)[:, None] & (d < width)[None, :])


sum_positions_aligned = jit(_sum_positions)
sum_positions_unaligned = jit(_sum_positions, any_address=["grad_ptr"])

ENTRIES = manifest.Entries(__name__)
ENTRIES.add("place_rows", (), dict(table="i64", origins="i64", places="i32"), dict(BLOCK_M=128))
for _name, _align in manifest.ALIGNMENTS:
    for _dtype in manifest.FLOATS:
        ENTRIES.add(
            "sum_positions",
            (_name, _dtype),
            dict(grad=_dtype, table="i64", sums="fp32"),
            dict(ALIGN=_align, BLOCK_ROWS=16, BLOCK_D=128),
            function=f"sum_positions_{_name}",
        )


class Rows(NamedTuple):
    """The patch rows on the device, for a kernel of some ALIGN."""

    table: Tensor  # [8, B] int64
    origins: Tensor  # [rows] int64
    places: Tensor  # [4, rows] int32


def placed(images: Images, device: torch.device, prefix: int, align: int) -> Rows:
    """One launch."""
    units = torch.tensor([1, align, align, align, 1, 1, 1, 1])[:, None]
    table = to_device((images.table // units).flatten(), torch.int64, device).view(8, -1)
    origins = torch.empty(images.rows, dtype=torch.int64, device=device)
    places = torch.empty(4, images.rows, dtype=torch.int32, device=device)
    entry = ENTRIES.one("place_rows")
    launch.launch(
        entry,
        (cdiv(images.rows, entry.constant("BLOCK_M")),),
        table_ptr=table,
        origins_ptr=origins,
        places_ptr=places,
        images=images.layout.batch,
        halvings=images.layout.batch.bit_length(),
        rows=images.rows,
        prefix=prefix,
        patch_height=images.layout.patch_height,
        stretch_units=images.layout.stretch // align,
    )
    return Rows(table, origins, places)


def sum_positions(grad: Tensor, images: Images, table: Tensor, prefix: int, positions: int) -> Tensor:
    """grad [rows + B·R, D] -> [R+P, D] fp32: that of each prefix row, and of each position, over the images that have
    it."""
    width = grad.shape[1]
    sums = torch.empty(prefix + positions, width, dtype=torch.float32, device=grad.device)
    is_aligned = width % 16 == 0 and grad.data_ptr() % 16 == 0
    entry = ENTRIES.one("sum_positions", manifest.alignment(is_aligned), grad.dtype)
    launch.launch(
        entry,
        (prefix + cdiv(positions, entry.constant("BLOCK_ROWS")), cdiv(width, entry.constant("BLOCK_D"))),
        grad_ptr=grad,
        table_ptr=table,
        sums_ptr=sums,
        images=images.layout.batch,
        halvings=images.layout.batch.bit_length(),
        rows=images.rows,
        longest=images.longest,
        positions=positions,
        prefix=prefix,
        width_units=width // entry.constant("ALIGN"),
    )
    return sums
