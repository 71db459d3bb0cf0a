"""What the GEMM multiplies with and starts from: the weight in the kernels' order, and the table of row constants.

How the normalisation is divided between the two is told in normalisation.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import KOrder, PatchLayout, cdiv
from fastvit.kernels.normalisation import UINT8_SCALE, ChannelConstants, constants_on_device
from fastvit.kernels.precision import product_precision, round_to_tf32


@functools.partial(jit, any_address=["weight_ptr", "bias_ptr"])
def prepare_weight(
    weight_ptr,  # [D, C, P_h, P_w]
    bias_ptr,  # [D] fp32, read only with has_bias
    constants_ptr,  # [4, C] fp32: the fields of ChannelConstants
    prepared_ptr,  # [D, k_length]
    normaliser_ptr,  # [2, k_length] fp32: pixel shift and pixel scale of every k
    bias_out_ptr,  # [D] fp32
    width: tl.int32,  # D
    channels: tl.int32,
    patch_height: tl.int32,
    patch_width: tl.int32,
    k_length: tl.int32,
    runs: tl.int32,
    padded_rows: tl.int32,
    channels_last: tl.int32,
    has_bias: tl.int32,
    inverse_factor: tl.float32,  # 1/256 for uint8, else 1
    tf32: tl.int32,  # whether products of fp32 are made at TF32 precision
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
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
    bias = tl.load(bias_ptr + d, mask=in_width & (has_bias != 0), other=0.0)
    tl.store(bias_out_ptr + d, bias + correction * inverse_factor, mask=in_width)


@functools.partial(jit, any_address=["bias_ptr", "positions_ptr", "prefix_ptr"])
def prepare_table(
    bias_ptr,  # [D] fp32, read only with has_bias
    positions_ptr,  # [rows - position_start, D] fp32, read only with has_positions
    prefix_ptr,  # [R, D] fp32, read only for rows below R
    table_ptr,  # [rows, D] fp32
    rows: tl.int32,  # R + N
    width: tl.int32,  # D
    prefix: tl.int32,  # R
    position_start: tl.int32,  # the first row that has a position: 0 or R
    has_bias: tl.int32,
    has_positions: tl.int32,
    factor: tl.float32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = (d < width)[None, :]
    inside = (row < rows)[:, None] & in_width
    is_prefix = (row < prefix)[:, None]
    has_position = ((row >= position_start) & (has_positions != 0))[:, None]
    bias = tl.load(bias_ptr + d, mask=(d < width) & (has_bias != 0), other=0.0)
    value = tl.load(prefix_ptr + row[:, None] * width + d[None, :], mask=inside & is_prefix, other=0.0)
    value = tl.where(is_prefix, value, bias[None, :])
    position_ptrs = positions_ptr + (row - position_start)[:, None] * width + d[None, :]
    value += tl.load(position_ptrs, mask=inside & has_position, other=0.0)
    tl.store(table_ptr + row[:, None] * width + d[None, :], value * factor, mask=inside)


ENTRIES = manifest.Entries(__name__)
for _source, _compute in manifest.ROUNDINGS:
    if _source != "fp32" and _compute == "fp32":
        continue  # the launcher widens a 16-bit weight for fp32 compute
    for _run in (8, 16):
        ENTRIES.add(
            "prepare_weight",
            (_source, _compute, f"run{_run}"),
            dict(weight=_source, bias="fp32", constants="fp32", prepared=_compute, normaliser="fp32", bias_out="fp32"),
            dict(RUN=_run, BLOCK_D=16, BLOCK_K=128),
        )
ENTRIES.add(
    "prepare_table",
    (),
    dict(bias="fp32", positions="fp32", prefix="fp32", table="fp32"),
    dict(BLOCK_ROWS=8, BLOCK_D=128),
    num_stages=1,
)


def prepare(
    weight: Tensor,
    bias: Tensor | None,
    constants: Sequence[ChannelConstants],
    is_uint8: bool,
    compute_dtype: torch.dtype,
    layout: PatchLayout,
    order: KOrder,
) -> tuple[Tensor, Tensor, Tensor]:
    """[D,C,P_h,P_w] weight -> W' [D, order.length] in the compute dtype; the pixels' shift and scale [2, order.length]
    and the bias [D], fp32."""
    if weight.dtype not in (compute_dtype, torch.float32):
        weight = weight.float()
    weight = weight.contiguous()
    bias = bias.float().contiguous() if bias is not None else None
    width = weight.shape[0]
    prepared = torch.empty(width, order.length, dtype=compute_dtype, device=weight.device)
    normaliser = torch.empty(2, order.length, dtype=torch.float32, device=weight.device)
    bias_out = torch.empty(width, dtype=torch.float32, device=weight.device)
    entry = ENTRIES.one("prepare_weight", weight.dtype, compute_dtype, f"run{order.run}")
    launch.launch(
        entry,
        (cdiv(width, entry.constant("BLOCK_D")),),
        weight_ptr=weight,
        bias_ptr=bias if bias is not None else bias_out,
        constants_ptr=constants_on_device(constants, weight.device),
        prepared_ptr=prepared,
        normaliser_ptr=normaliser,
        bias_out_ptr=bias_out,
        width=width,
        channels=layout.channels,
        patch_height=layout.patch_height,
        patch_width=layout.patch_width,
        k_length=order.length,
        runs=order.runs,
        padded_rows=order.padded_rows,
        channels_last=int(layout.channels_last),
        has_bias=int(bias is not None),
        inverse_factor=1.0 / UINT8_SCALE if is_uint8 else 1.0,
        tf32=int(product_precision(compute_dtype) == "tf32"),
    )
    return prepared, normaliser, bias_out


def make_table(
    rows: int,
    width: int,
    bias: Tensor | None,
    positions: Tensor | None,
    prefix: Tensor | None,
    factor: float,
    like: Tensor,
) -> Tensor:
    """[rows, D] fp32: what every row of the sequence starts from, times factor. positions has `rows` rows or as many
    as there are rows without prefix."""
    table = torch.empty(rows, width, dtype=torch.float32, device=like.device)
    positions = positions.float().contiguous() if positions is not None else None
    prefix = prefix.float().contiguous() if prefix is not None else None
    entry = ENTRIES.one("prepare_table")
    launch.launch(
        entry,
        (cdiv(rows, entry.constant("BLOCK_ROWS")), cdiv(width, entry.constant("BLOCK_D"))),
        bias_ptr=bias if bias is not None else table,
        positions_ptr=positions if positions is not None else table,
        prefix_ptr=prefix if prefix is not None else table,
        table_ptr=table,
        rows=rows,
        width=width,
        prefix=prefix.shape[0] if prefix is not None else 0,
        position_start=rows - positions.shape[0] if positions is not None else 0,
        has_bias=int(bias is not None),
        has_positions=int(positions is not None),
        factor=factor,
    )
    return table
