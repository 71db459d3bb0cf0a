"""split_heads, backward: the gradients of q, k and v, of any strides, to one packed gradient, a read and a write of
each. The sums for the bias are left as a row of partial ones a program, which a second launch adds in a fixed order
(row_sums.py). Forward is made of views."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.cpu import split_heads as plain
from fastvit.cpu.split_heads import forward
from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import INT32_LIMIT, cdiv
from fastvit.kernels.row_sums import sum_partials

__all__ = ["backward", "forward"]

ALIGN = 8  # values that divide D/H, every stride and every address
# Programs: six for each of the 132 multiprocessors of an H200; a constant, so that results never vary.
PROGRAMS = 792


@triton.jit
def _packed(from_ptr, to_ptr, place, inside):
    """The values of a tile in float32, copied on their way."""
    values = tl.load(from_ptr, mask=inside, other=0.0)
    tl.store(to_ptr + place, values, mask=inside)
    return values.to(tl.float32)


@jit
def pack_heads(
    d_q_ptr,  # [B, H, T, D/H], any strides but the last
    d_k_ptr,
    d_v_ptr,
    d_qkv_ptr,  # [B, T, 3, D]
    partials_ptr,  # [programs, 3, D] fp32, written with has_sums
    rows: tl.int32,  # B * T
    rows_per_program: tl.int32,
    tokens: tl.int32,  # T
    width_units: tl.int32,  # D / ALIGN
    head_units: tl.int32,  # D / H / ALIGN
    q_batch: tl.int64,  # strides / ALIGN
    q_head: tl.int64,
    q_token: tl.int64,
    k_batch: tl.int64,
    k_head: tl.int64,
    k_token: tl.int64,
    v_batch: tl.int64,
    v_head: tl.int64,
    v_token: tl.int64,
    has_sums: tl.int32,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    width, head_width = width_units * ALIGN, head_units * ALIGN
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = column < width
    head, value = (column // head_width).to(tl.int64), column % head_width
    d_q_ptr += (head * (q_head * ALIGN) + value)[None, :]
    d_k_ptr += (head * (k_head * ALIGN) + value)[None, :]
    d_v_ptr += (head * (v_head * ALIGN) + value)[None, :]
    q_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    k_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    v_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    start = tl.program_id(1) * rows_per_program
    end = tl.minimum(start + rows_per_program, rows)
    for row_start in range(start, end, BLOCK_ROWS):
        row = row_start + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & in_row[None, :]
        batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
        place = row.to(tl.int64)[:, None] * (3 * width) + column[None, :]
        from_q = d_q_ptr + ((batch * q_batch + token * q_token) * ALIGN)[:, None]
        from_k = d_k_ptr + ((batch * k_batch + token * k_token) * ALIGN)[:, None]
        from_v = d_v_ptr + ((batch * v_batch + token * v_token) * ALIGN)[:, None]
        q_sums += _packed(from_q, d_qkv_ptr, place, inside)
        k_sums += _packed(from_k, d_qkv_ptr, place + width, inside)
        v_sums += _packed(from_v, d_qkv_ptr, place + 2 * width, inside)
    partials_ptr += tl.program_id(1).to(tl.int64) * (3 * width) + column
    written = in_row & (has_sums != 0)
    tl.store(partials_ptr, tl.sum(q_sums, axis=0), mask=written)
    tl.store(partials_ptr + width, tl.sum(k_sums, axis=0), mask=written)
    tl.store(partials_ptr + 2 * width, tl.sum(v_sums, axis=0), mask=written)


ENTRIES = manifest.Entries(__name__)
for _dtype in manifest.FLOATS:
    ENTRIES.add(
        "pack_heads",
        (_dtype,),
        dict.fromkeys(("d_q", "d_k", "d_v", "d_qkv"), _dtype) | dict(partials="fp32"),
        dict(ALIGN=ALIGN, BLOCK_ROWS=16, BLOCK_COLUMNS=64),
        num_stages=1,
        max_registers=80,
        copies=tuple((f"{name}_ptr", 16) for name in ("d_q", "d_k", "d_v", "d_qkv")),
    )


def backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Three of [B, H, T, D/H] -> [B, T, 3D], and its sums over batch and tokens, [3D] fp32."""
    batch, heads, tokens, head_width = d_q.shape
    gradients = [_readable(gradient) for gradient in (d_q, d_k, d_v)]
    entry = ENTRIES.find("pack_heads", d_q.dtype)
    if entry is None or head_width % ALIGN or any(gradient.data_ptr() % 16 for gradient in gradients):
        return plain.backward(d_q, d_k, d_v, has_bias)
    rows, width = batch * tokens, heads * head_width
    if rows >= INT32_LIMIT:
        raise ValueError(f"qkv: {batch} x {tokens} is 2^31 rows")
    d_qkv = d_q.new_empty(batch, tokens, 3 * width)
    tiles, block_rows = cdiv(width, entry.constant("BLOCK_COLUMNS")), entry.constant("BLOCK_ROWS")
    rows_per_program = max(cdiv(cdiv(rows, max(PROGRAMS // tiles, 1)), block_rows), 1) * block_rows
    programs = cdiv(rows, rows_per_program)
    partials = torch.empty(programs if has_bias else 0, 3 * width, dtype=torch.float32, device=d_q.device)
    strides = {
        f"{name}_{axis}": stride // ALIGN
        for name, gradient in zip("qkv", gradients, strict=True)
        for axis, stride in zip(("batch", "head", "token"), gradient.stride(), strict=False)
    }
    launch.launch(
        entry,
        (tiles, programs),
        **{f"d_{name}_ptr": gradient for name, gradient in zip("qkv", gradients, strict=True)},
        d_qkv_ptr=d_qkv,
        partials_ptr=partials,
        rows=rows,
        rows_per_program=rows_per_program,
        tokens=tokens,
        width_units=width // ALIGN,
        head_units=head_width // ALIGN,
        **strides,
        has_sums=int(has_bias),
    )
    return d_qkv, sum_partials(partials) if has_bias else partials.view(0)


def _readable(gradient: Tensor) -> Tensor:
    """Itself where the values of a head lie side by side, a copy where they don't."""
    *strides, last = gradient.stride()
    return gradient if last == 1 and all(stride % ALIGN == 0 for stride in strides) else gradient.contiguous()


def _call() -> None:
    gradients = (torch.empty(256, 197, 12, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    d_q, d_k, d_v = (gradient.permute(0, 2, 1, 3) for gradient in gradients)  # as flash attention leaves them
    backward(d_q, d_k, d_v, True)


# Calls that stand for the op where launches are counted: ViT-B/16 at 224 pixels, 256 images.
CALLS = {"split_heads backward": _call}
