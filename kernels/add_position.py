"""add_position: [B, N, D] tokens plus positions, behind their prefix rows, in one pass."""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import INT32_LIMIT, cdiv
from fastvit.kernels.prepare_weight import alike, table_rows
from fastvit.kernels.row_sums import sum_rows

READABLE = (torch.float32, torch.float16, torch.bfloat16)  # by every kernel


@functools.partial(jit, any_address=["positions_ptr", "prefix_ptr"])
def position_table(
    positions_ptr,  # [rows - position_start, D]
    prefix_ptr,  # [R, D] in the same dtype, read only for rows below R
    table_ptr,  # [rows, D] fp32
    rows: tl.int32,  # R + N
    width: tl.int32,  # D
    prefix: tl.int32,  # R
    position_start: tl.int32,  # the first row that has a position: 0 or R
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value, place, inside = table_rows(positions_ptr, prefix_ptr, 0.0, row, d, rows, width, prefix, position_start)
    tl.store(table_ptr + place, value, mask=inside)


def _add_position(
    tokens_ptr,  # [B, N, D], any strides
    table_ptr,  # [R+N, D] fp32: prefix and positions
    out_ptr,  # [B, R+N, D]
    rows: tl.int32,  # B * (R+N)
    length: tl.int32,  # R+N
    prefix: tl.int32,  # R
    width_units: tl.int32,  # D
    batch_stride: tl.int64,  # in units of ALIGN, like the next
    token_stride: tl.int64,
    width_stride: tl.int64,  # read only without CONTIGUOUS
    ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # the values of a token lie side by side
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    width = width_units * ALIGN
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (m < rows)[:, None] & (d < width)[None, :]
    batch = m // length
    row = m - batch * length
    value = tl.load(table_ptr + (row * width)[:, None] + d[None, :], mask=inside, other=0.0)
    token = batch.to(tl.int64) * (batch_stride.to(tl.int64) * ALIGN) + (row - prefix).to(tl.int64) * (
        token_stride.to(tl.int64) * ALIGN
    )
    if CONTIGUOUS:
        token_ptrs = tokens_ptr + token[:, None] + d[None, :]
    else:
        token_ptrs = tokens_ptr + token[:, None] + (d.to(tl.int64) * width_stride)[None, :]
    value += tl.load(token_ptrs, mask=inside & (row >= prefix)[:, None], other=0.0).to(tl.float32)
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside)


aligned = jit(_add_position)
unaligned = jit(_add_position, any_address=["tokens_ptr"])

ENTRIES = manifest.Entries(__name__)
for _dtype in manifest.FLOATS:
    ENTRIES.add(
        "position_table",
        (_dtype,),
        dict(positions=_dtype, prefix=_dtype, table="fp32"),
        dict(BLOCK_ROWS=8, BLOCK_D=128),
        num_stages=1,
    )
for _name, _align in manifest.ALIGNMENTS:
    for _source, _out in manifest.ROUNDINGS:
        ENTRIES.add(
            "add_position",
            (_name, _source, _out),
            dict(tokens=_source, table="fp32", out=_out),
            dict(ALIGN=_align, CONTIGUOUS=_name == "aligned", BLOCK_ROWS=8, BLOCK_D=256),
            num_stages=1,
            function=_name,
        )


def forward(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N, D] tokens, [N, D] or [R+N, D] positions, [R, D] prefix -> [B, R+N, D] in dtype."""
    batch, patches, width = tokens.shape
    prefix_rows = prefix.shape[0] if prefix is not None else 0
    length = prefix_rows + patches
    if batch * length >= INT32_LIMIT or length * width >= INT32_LIMIT:
        raise ValueError(f"tokens: {list(tokens.shape)} has 2^31 rows, or as many values a sample")
    kernel_dtype = dtype if ENTRIES.find("add_position", "aligned", tokens.dtype, dtype) else torch.float32
    out = torch.empty(batch, length, width, dtype=kernel_dtype, device=tokens.device)
    if out.numel() == 0:
        return out.to(dtype)
    table = _table(pos_embed, prefix, length)
    batch_stride, token_stride, width_stride = tokens.stride()
    is_aligned = (
        width_stride == 1
        and all(value % 16 == 0 for value in (batch_stride, token_stride, width))
        and tokens.data_ptr() % 16 == 0
    )
    entry = ENTRIES.one("add_position", manifest.alignment(is_aligned), tokens.dtype, kernel_dtype)
    align = entry.constant("ALIGN")
    launch.launch(
        entry,
        (cdiv(batch * length, entry.constant("BLOCK_ROWS")), cdiv(width, entry.constant("BLOCK_D"))),
        tokens_ptr=tokens,
        table_ptr=table,
        out_ptr=out,
        rows=batch * length,
        length=length,
        prefix=prefix_rows,
        width_units=width // align,
        batch_stride=batch_stride // align,
        token_stride=token_stride // align,
        width_stride=width_stride,
    )
    return out.to(dtype)


def _table(positions: Tensor, prefix: Tensor | None, length: int) -> Tensor:
    """[length, D] fp32: what is added to every image alike. Parameters of one dtype are read as they are."""
    width = positions.shape[-1]
    positions, prefix = alike(READABLE, positions, prefix)
    table = torch.empty(length, width, dtype=torch.float32, device=positions.device)
    entry = ENTRIES.one("position_table", positions.dtype)
    launch.launch(
        entry,
        (cdiv(length, entry.constant("BLOCK_ROWS")), cdiv(width, entry.constant("BLOCK_D"))),
        positions_ptr=positions,
        prefix_ptr=prefix if prefix is not None else positions,
        table_ptr=table,
        rows=length,
        width=width,
        prefix=prefix.shape[0] if prefix is not None else 0,
        position_start=length - positions.shape[0],
    )
    return table


def backward(grad: Tensor) -> Tensor:
    """[B, R+N, D] -> [R+N, D] fp32, the gradient of every row that is added, summed over the batch."""
    batch, length, width = grad.shape
    grad = supported(grad).contiguous()
    return sum_rows(grad.view(batch, length * width)).view(length, width)


def supported(grad: Tensor) -> Tensor:
    """The gradient in a dtype the kernels read."""
    return grad if grad.dtype in READABLE else grad.float()


def _example(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


# Calls that stand for the op where launches are counted: ViT-B/16 at 224 pixels, 256 images, in bfloat16.
CALLS = {
    "add_position forward": lambda: forward(
        _example(256, 196, 768), _example(196, 768), _example(1, 768), torch.bfloat16
    ),
    "add_position backward": lambda: backward(_example(256, 197, 768)),
}
