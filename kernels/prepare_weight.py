"""One launch before the GEMM: the weight in the kernels' order, and the table of row constants that it starts from.

How the normalisation is divided between the two is told in normalisation.py.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import KOrder, PatchLayout, cdiv
from fastvit.kernels.normalisation import UINT8_SCALE, ChannelConstants, constants_on_device
from fastvit.kernels.precision import product_precision, round_to_tf32


@triton.jit
def table_rows(positions_ptr, prefix_ptr, bias, row, d, rows, width, prefix, position_start):
    """What is added to rows of the sequence at columns d: positions from position_start on, behind the prefix or the
    bias [1, D]; and where these rows lie in the table, and whether they do."""
    inside = (row < rows)[:, None] & (d < width)[None, :]
    is_prefix = (row < prefix)[:, None]
    place = row[:, None] * width + d[None, :]
    first = tl.load(prefix_ptr + place, mask=inside & is_prefix, other=0.0).to(tl.float32)
    position_ptrs = positions_ptr + place - position_start * width
    position = tl.load(position_ptrs, mask=inside & (row >= position_start)[:, None], other=0.0).to(tl.float32)
    return tl.where(is_prefix, first, bias) + position, place, inside


@functools.partial(jit, any_address=["weight_ptr", "bias_ptr", "positions_ptr", "prefix_ptr"])
def prepare_weight(
    weight_ptr,  # [D, C, P_h, P_w], and the next three in the same dtype
    bias_ptr,  # [D], read only with has_bias
    positions_ptr,  # [rows - position_start, D]
    prefix_ptr,  # [R, D]
    constants_ptr,  # [4, C] fp32: the fields of ChannelConstants
    prepared_ptr,  # [D, k_length]
    normaliser_ptr,  # [2, k_length] fp32: pixel shift and pixel scale of every k
    table_ptr,  # [rows, D] fp32: bias, positions and prefix, times factor
    width: tl.int32,  # D
    channels: tl.int32,
    patch_height: tl.int32,
    patch_width: tl.int32,
    k_length: tl.int32,
    runs: tl.int32,
    padded_rows: tl.int32,
    channels_last: tl.int32,
    has_bias: tl.int32,
    tf32: tl.int32,  # whether products of fp32 are made at TF32 precision
    factor: tl.float32,  # 256 for uint8, else 1
    rows: tl.int32,  # R + N; 0 where no table is wanted
    prefix: tl.int32,  # R
    position_start: tl.int32,  # the first row that has a position: 0 or R; rows where none has
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A program has BLOCK_D rows of the weight, and the columns of the table that are added to their products."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = d < width
    correction = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k_start in range(0, k_length, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        column = k % RUN
        plane = k // RUN // padded_rows
        row = k // RUN - plane * padded_rows
        # NCHW: a plane is a run of a channel. channels_last: a run of a row of pixels, whose channels alternate.
        plane_channel = plane // runs
        place = (plane - plane_channel * runs) * RUN + column
        pixel_x = place // channels
        channel = tl.where(channels_last != 0, place - pixel_x * channels, plane_channel)
        x = tl.where(channels_last != 0, pixel_x, place)
        inside = (x < patch_width) & (row < patch_height) & (k < k_length)

        source = (channel * patch_height + row) * patch_width + x
        size = channels * patch_height * patch_width
        weight_ptrs = weight_ptr + d.to(tl.int64)[:, None] * size + source[None, :]
        weight = tl.load(weight_ptrs, mask=in_width[:, None] & inside[None, :], other=0.0).to(tl.float32)
        weight_scale = tl.load(constants_ptr + channel, mask=inside, other=0.0)
        pixel_shift = tl.load(constants_ptr + channels + channel, mask=inside, other=0.0)
        bias_shift = tl.load(constants_ptr + 2 * channels + channel, mask=inside, other=0.0)
        pixel_scale = tl.load(constants_ptr + 3 * channels + channel, mask=inside, other=0.0)
        rounded = (weight * weight_scale[None, :]).to(prepared_ptr.dtype.element_ty)
        if prepared_ptr.dtype.element_ty == tl.float32:
            rounded = tl.where(tf32 != 0, round_to_tf32(rounded), rounded)
        correction += tl.sum(rounded.to(tl.float32) * bias_shift[None, :], axis=1)

        prepared_ptrs = prepared_ptr + d.to(tl.int64)[:, None] * k_length + k[None, :]
        tl.store(prepared_ptrs, rounded, mask=in_width[:, None] & (k < k_length)[None, :])
        is_writer = (k < k_length) & (tl.program_id(0) == 0)
        tl.store(normaliser_ptr + k, pixel_shift, mask=is_writer)
        tl.store(normaliser_ptr + k_length + k, pixel_scale, mask=is_writer)

    bias = tl.load(bias_ptr + d, mask=in_width & (has_bias != 0), other=0.0).to(tl.float32) + correction / factor
    for row_start in range(0, rows, BLOCK_ROWS):
        row = row_start + tl.arange(0, BLOCK_ROWS)
        value, place, inside = table_rows(
            positions_ptr, prefix_ptr, bias[None, :], row, d, rows, width, prefix, position_start
        )
        tl.store(table_ptr + place, value * factor, mask=inside)


ENTRIES = manifest.Entries(__name__)
for _source, _compute in manifest.ROUNDINGS:
    if _source != "fp32" and _compute == "fp32":
        continue  # the launcher widens 16-bit parameters for fp32 compute
    for _run in (8, 16):
        ENTRIES.add(
            "prepare_weight",
            (_source, _compute, f"run{_run}"),
            dict.fromkeys(("weight", "bias", "positions", "prefix"), _source)
            | dict(constants="fp32", prepared=_compute, normaliser="fp32", table="fp32"),
            dict(RUN=_run, BLOCK_D=8, BLOCK_K=256, BLOCK_ROWS=128),
        )


class Prepared(NamedTuple):
    """What a GEMM reads besides the images."""

    weight: Tensor  # W' [D, order.length] in the compute dtype
    normaliser: Tensor  # [2, order.length] fp32: the pixels' shift and scale
    table: Tensor  # [R+N, D] fp32


def alike(readable: Container[torch.dtype], *tensors: Tensor | None) -> list[Any]:
    """Contiguous and of one dtype: as they are where they share one that can be read, else in fp32."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    shared = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = shared if shared in readable else torch.float32
    return [None if tensor is None else tensor.to(dtype).contiguous() for tensor in tensors]


def prepare(
    weight: Tensor,
    constants: Sequence[ChannelConstants],
    is_uint8: bool,
    compute_dtype: torch.dtype,
    layout: PatchLayout,
    order: KOrder,
    rows: int = 0,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Prepared:
    """[D,C,P_h,P_w] weight -> what the GEMM needs, with a table of `rows` rows.

    positions has `rows` rows, or as many as there are without prefix. Parameters of one dtype are read as they are, of
    several in fp32.
    """
    weight, bias, positions, prefix = alike((compute_dtype, torch.float32), weight, bias, positions, prefix)
    width = weight.shape[0]
    prepared = torch.empty(width, order.length, dtype=compute_dtype, device=weight.device)
    normaliser = torch.empty(2, order.length, dtype=torch.float32, device=weight.device)
    table = torch.empty(rows, width, dtype=torch.float32, device=weight.device)
    entry = ENTRIES.one("prepare_weight", weight.dtype, compute_dtype, f"run{order.run}")
    launch.launch(
        entry,
        (cdiv(width, entry.constant("BLOCK_D")),),
        weight_ptr=weight,
        bias_ptr=bias if bias is not None else weight,
        positions_ptr=positions if positions is not None else weight,
        prefix_ptr=prefix if prefix is not None else weight,
        constants_ptr=constants_on_device(constants, weight.device),
        prepared_ptr=prepared,
        normaliser_ptr=normaliser,
        table_ptr=table,
        width=width,
        channels=layout.channels,
        patch_height=layout.patch_height,
        patch_width=layout.patch_width,
        k_length=order.length,
        runs=order.runs,
        padded_rows=order.padded_rows,
        channels_last=int(layout.channels_last),
        has_bias=int(bias is not None),
        tf32=int(product_precision(compute_dtype) == "tf32"),
        factor=UINT8_SCALE if is_uint8 else 1.0,
        rows=rows,
        prefix=prefix.shape[0] if prefix is not None else 0,
        position_start=rows - positions.shape[0] if positions is not None else rows,
    )
    return Prepared(prepared, normaliser, table)
