"""Sums over rows: the gradients of bias, positions and prefix. Deterministic, as every order of addition is fixed."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import INT32_LIMIT, cdiv

TARGET_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H200; a constant, so that results never vary


def _sum_rows(
    matrix_ptr,  # [rows, columns]
    sums_ptr,  # [splits, columns] fp32
    rows: tl.int32,
    rows_per_split: tl.int32,
    column_units: tl.int32,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = column_units * ALIGN
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    split = tl.program_id(1)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, rows)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for row_start in range(start, end, BLOCK_ROWS):
        row = row_start + tl.arange(0, BLOCK_ROWS)
        values_ptr = matrix_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        values = tl.load(values_ptr, mask=(row < end)[:, None] & (column < columns)[None, :], other=0.0)
        sums += values.to(tl.float32)
    sums_ptrs = sums_ptr + split.to(tl.int64) * columns + column
    tl.store(sums_ptrs, tl.sum(sums, axis=0), mask=column < columns)


sum_rows_aligned = jit(_sum_rows)
sum_rows_unaligned = jit(_sum_rows, any_address=["matrix_ptr"])


def _sum_segments(
    grad_ptr,  # [B, R+kept, D]
    order_ptr,  # [B * kept] int64: which patch row comes at each place of the sorted order
    starts_ptr,  # [segments + 1] int64: where each segment starts in the sorted order
    sums_ptr,  # [segments, D]
    kept: tl.int32,
    prefix: tl.int32,  # R
    width_units: tl.int32,  # D
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row s of the result is the sum of the patch rows order[starts[s]:starts[s+1]]; none gives zeros."""
    width = width_units * ALIGN
    segment = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts_ptr + segment)
    end = tl.load(starts_ptr + segment + 1)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for place_start in range(start, end, BLOCK_ROWS):
        place = place_start + tl.arange(0, BLOCK_ROWS)
        row = tl.load(order_ptr + place, mask=place < end, other=0)
        token = row + (row // kept + 1) * prefix
        values_ptr = grad_ptr + (token * width)[:, None] + d[None, :]
        values = tl.load(values_ptr, mask=(place < end)[:, None] & (d < width)[None, :], other=0.0)
        sums += values.to(tl.float32)
    total = tl.sum(sums, axis=0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + segment * width + d, total, mask=d < width)


sum_segments_aligned = jit(_sum_segments)
sum_segments_unaligned = jit(_sum_segments, any_address=["grad_ptr"])

ENTRIES = manifest.Entries(__name__)
for _name, _align in manifest.ALIGNMENTS:
    for _dtype in manifest.FLOATS:
        ENTRIES.add(
            "sum_rows",
            (_name, _dtype),
            dict(matrix=_dtype, sums="fp32"),
            dict(ALIGN=_align, BLOCK_ROWS=8, BLOCK_COLUMNS=256),
            function=f"sum_rows_{_name}",
        )
    ENTRIES.add(
        "sum_partials",
        (_name,),
        dict(matrix="fp32", sums="fp32"),
        dict(ALIGN=_align, BLOCK_ROWS=128, BLOCK_COLUMNS=32),
        function=f"sum_rows_{_name}",
    )
    for _dtype, _out in dict.fromkeys((d, out) for d in manifest.FLOATS for out in (d, "fp32")):
        ENTRIES.add(
            "sum_segments",
            (_name, _dtype, _out),
            dict(grad=_dtype, order="i64", starts="i64", sums=_out),
            dict(ALIGN=_align, BLOCK_ROWS=4, BLOCK_D=256),
            function=f"sum_segments_{_name}",
        )


def sum_rows(matrix: Tensor) -> Tensor:
    """[rows, columns] contiguous -> [columns] fp32, the sum over rows."""
    rows, columns = matrix.shape
    if rows == 0 or columns == 0:
        return torch.zeros(columns, dtype=torch.float32, device=matrix.device)
    if columns >= INT32_LIMIT:
        raise ValueError(f"grad: {columns} values a sample; less than 2^31 are supported")
    is_aligned = columns % 16 == 0 and matrix.data_ptr() % 16 == 0
    entry = ENTRIES.one("sum_rows", manifest.alignment(is_aligned), matrix.dtype)
    block_rows = entry.constant("BLOCK_ROWS")
    column_tiles = cdiv(columns, entry.constant("BLOCK_COLUMNS"))
    splits = max(1, min(TARGET_PROGRAMS // column_tiles, cdiv(rows, 4 * block_rows)))
    rows_per_split = cdiv(cdiv(rows, splits), block_rows) * block_rows
    splits = cdiv(rows, rows_per_split)
    sums = torch.empty(splits, columns, dtype=torch.float32, device=matrix.device)
    launch.launch(
        entry,
        (column_tiles, splits),
        matrix_ptr=matrix,
        sums_ptr=sums,
        rows=rows,
        rows_per_split=rows_per_split,
        column_units=columns // entry.constant("ALIGN"),
    )
    return sums[0] if splits == 1 else sum_rows(sums)


def sum_partials(partials: Tensor) -> Tensor:
    """[programs, columns] fp32, what each program of a launch summed -> [columns] fp32, in one more launch."""
    programs, columns = partials.shape
    if programs == 0:
        return partials.new_zeros(columns)
    sums = partials.new_empty(columns)
    entry = ENTRIES.one("sum_partials", manifest.alignment(columns % 16 == 0))
    launch.launch(
        entry,
        (cdiv(columns, entry.constant("BLOCK_COLUMNS")), 1),
        matrix_ptr=partials,
        sums_ptr=sums,
        rows=programs,
        rows_per_split=programs,
        column_units=columns // entry.constant("ALIGN"),
    )
    return sums


def sum_by_key(grad: Tensor, keys: Tensor, segments: int, prefix: int, dtype: torch.dtype) -> Tensor:
    """Sums the patch rows of grad [B, R+kept, D] that share a key -> [segments, D] in dtype.

    keys: [B, kept] int64; a key outside 0..segments-1 belongs to no segment. Rows of a segment are added in the order
    in which they stand in grad: the sort is stable and nothing is added atomically.
    """
    width = grad.shape[2]
    keys = torch.where((keys < 0) | (keys >= segments), segments, keys)
    sorted_keys, order = torch.sort(keys.flatten(), stable=True)
    starts = torch.searchsorted(sorted_keys, torch.arange(segments + 1, device=keys.device))
    sums = torch.empty(segments, width, dtype=dtype, device=grad.device)
    is_aligned = width % 16 == 0 and grad.data_ptr() % 16 == 0
    entry = ENTRIES.one("sum_segments", manifest.alignment(is_aligned), grad.dtype, dtype)
    launch.launch(
        entry,
        (segments, cdiv(width, entry.constant("BLOCK_D"))),
        grad_ptr=grad,
        order_ptr=order,
        starts_ptr=starts,
        sums_ptr=sums,
        kept=keys.shape[1],
        prefix=prefix,
        width_units=width // entry.constant("ALIGN"),
    )
    return sums
