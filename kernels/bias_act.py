"""bias_act: act(x + bias), perhaps times (up + its bias), a read and a write of each.

Backward reads the gradient and the saved products once, writes those of the products, and leaves a row of partial sums
a program for the biases; a second launch adds these in a fixed order (row_sums.py).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.cpu import bias_act as plain
from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import INT32_LIMIT, cdiv
from fastvit.kernels.row_sums import sum_partials

ALIGN = 8  # values that divide F and every address
# Programs of a backward, without and with up: six or four for each of the 132 multiprocessors of an H200, as many as
# have registers there. Constants, so that results never vary.
PROGRAMS = {False: 792, True: 528}

# Parameters may lie anywhere: optimizers and sharding cut them out of one flat buffer.
_jit = functools.partial(jit, any_address=["bias_ptr", "up_bias_ptr"])


@triton.jit
def _activated(x, function, linear, cubic):
    """act(x) and its slope there. Which function is no constant: a program takes one way through, and compiled once."""
    if function == 0:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif function == 1:
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        bounded = tl.minimum(tl.abs(x), 1e19)  # 0 · ∞ would be no number
        bend = cubic * bounded * bounded
        inner = x * (linear + bend)
        # Neither sigmoid nor its slope is a difference of numbers that are nearly equal.
        small = tl.exp(-tl.abs(inner))
        large = 1 / (1 + small)
        gate = tl.where(inner < 0, small, 1.0) * large
        value = x * gate
        slope = gate + x * (small * large * large) * (linear + 3 * bend)
    return value, slope


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@_jit
def bias_act_forward(
    x_ptr,  # [rows, F]
    up_ptr,  # [rows, F] with GATED
    bias_ptr,  # [F], read with has_bias
    up_bias_ptr,  # [F] in the same dtype, read with has_up_bias
    out_ptr,  # [rows, F]
    rows: tl.int32,
    width_units: tl.int32,  # F / ALIGN
    stride_units: tl.int32,  # from a row of x or up to the next, / ALIGN
    function: tl.int32,
    linear: tl.float32,
    cubic: tl.float32,
    has_bias: tl.int32,
    has_up_bias: tl.int32,
    ALIGN: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    width, stride = width_units * ALIGN, stride_units * ALIGN
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    row = tl.program_id(0) // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = column < width
    inside = (row < rows)[:, None] & in_row[None, :]
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    x = _load(x_ptr + place, inside) + _load(bias_ptr + column, in_row & (has_bias != 0))[None, :]
    value, _ = _activated(x, function, linear, cubic)
    if GATED:
        value *= _load(up_ptr + place, inside) + _load(up_bias_ptr + column, in_row & (has_up_bias != 0))[None, :]
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=inside)


@_jit
def bias_act_backward(
    d_out_ptr,  # [rows, F]
    x_ptr,  # [rows, F]
    up_ptr,  # [rows, F] with GATED
    bias_ptr,  # [F], read with has_bias
    up_bias_ptr,  # [F] in the same dtype, read with has_up_bias
    d_x_ptr,  # like x
    d_up_ptr,  # like up
    partials_ptr,  # [programs, F] fp32 sums of d_x, written with has_sums
    up_partials_ptr,  # the same of d_up, with GATED
    rows: tl.int32,
    rows_per_program: tl.int32,
    width_units: tl.int32,  # F / ALIGN
    stride_units: tl.int32,  # from a row of x, up or one of their gradients to the next, / ALIGN
    partials_units: tl.int32,  # from a row of partials to the next, / ALIGN
    function: tl.int32,
    linear: tl.float32,
    cubic: tl.float32,
    has_bias: tl.int32,
    has_up_bias: tl.int32,
    has_sums: tl.int32,
    ALIGN: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    width, stride = width_units * ALIGN, stride_units * ALIGN
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = column < width
    bias = _load(bias_ptr + column, in_row & (has_bias != 0))[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    if GATED:
        up_bias = _load(up_bias_ptr + column, in_row & (has_up_bias != 0))[None, :]
        up_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    start = tl.program_id(1) * rows_per_program
    end = tl.minimum(start + rows_per_program, rows)
    for row_start in range(start, end, BLOCK_ROWS):
        row = row_start + tl.arange(0, BLOCK_ROWS)
        inside = (row < end)[:, None] & in_row[None, :]
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        # Zero outside, and with it both gradients.
        d_out = _load(d_out_ptr + (row.to(tl.int64)[:, None] * width + column[None, :]), inside)
        value, slope = _activated(_load(x_ptr + place, inside) + bias, function, linear, cubic)
        d_x = d_out * slope
        if GATED:
            d_up = d_out * value
            d_x *= _load(up_ptr + place, inside) + up_bias
            tl.store(d_up_ptr + place, d_up.to(d_up_ptr.dtype.element_ty), mask=inside)
            up_sums += d_up
        tl.store(d_x_ptr + place, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        sums += d_x
    place = tl.program_id(1).to(tl.int64) * (partials_units * ALIGN) + column
    tl.store(partials_ptr + place, tl.sum(sums, axis=0), mask=in_row & (has_sums != 0))
    if GATED:
        tl.store(up_partials_ptr + place, tl.sum(up_sums, axis=0), mask=in_row & (has_sums != 0))


# Dtypes of products (result and gradients too) and of biases.
DTYPES = (
    ("fp32", "fp32"),
    *((half, "fp32") for half in manifest.HALF),  # autocast
    *((half, half) for half in manifest.HALF),
)
ENTRIES = manifest.Entries(__name__)


def _declare() -> None:
    for dtype, parameters in DTYPES:
        products, biases = dict.fromkeys(("x", "up"), dtype), dict.fromkeys(("bias", "up_bias"), parameters)
        gradients = dict.fromkeys(("d_x", "d_up"), dtype) | dict.fromkeys(("partials", "up_partials"), "fp32")
        for gated in (False, True):
            read = ("x", "up") if gated else ("x",)
            for kernel, pointers, copied, rows, registers in (
                ("bias_act_forward", products | biases | dict(out=dtype), read, 16, 128),
                (
                    "bias_act_backward",
                    dict(d_out=dtype) | products | biases | gradients,
                    ("d_out", *read),
                    8,
                    128 if gated else 80,
                ),
            ):
                ENTRIES.add(
                    kernel,
                    (dtype, parameters, "gated" if gated else ""),
                    pointers,
                    dict(ALIGN=ALIGN, GATED=gated, BLOCK_ROWS=rows, BLOCK_COLUMNS=128),
                    num_stages=1,
                    max_registers=registers,
                    copies=tuple((f"{name}_ptr", 16) for name in copied),
                )


_declare()


def forward(
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    gate_last: bool | None,
    dtype: torch.dtype,
) -> Tensor:
    """[..., F] products and [F] biases -> [..., F]; both products may be the halves of x."""
    entry = _entry("bias_act_forward", (x, up), bias, gate_last, dtype)
    if entry is None:
        return plain.forward(x, bias, up, up_bias, act, gate_last, dtype)
    x, up = x.contiguous(), None if up is None else up.contiguous()
    gate, gate_bias, up, up_bias = plain.operands(x, bias, up, up_bias, gate_last)
    out = torch.empty(gate.shape, dtype=dtype, device=x.device)
    width = gate.shape[-1]
    rows = out.numel() // width
    tiles = cdiv(rows, entry.constant("BLOCK_ROWS")) * cdiv(width, entry.constant("BLOCK_COLUMNS"))
    launch.launch(
        entry,
        (tiles,),
        x_ptr=gate,
        up_ptr=gate if up is None else up,
        out_ptr=out,
        rows=rows,
        **_described(entry, x, width, act, gate_bias, up_bias),
    )
    return out


def backward(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    gate_last: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and up, and the sums over rows of both, [F] or [2F] fp32."""
    entry = _entry("bias_act_backward", (x, up, d_out), bias, gate_last, d_out.dtype)
    if entry is None:
        return plain.backward(d_out, x, bias, up, up_bias, act, gate_last)
    x, up = x.contiguous(), None if up is None else up.contiguous()
    nothing = x.new_empty(0)
    d_x, d_up = torch.empty_like(x), nothing if up is None else torch.empty_like(up)
    has_sums = bias is not None or up_bias is not None
    gate, gate_bias, other, up_bias = plain.operands(x, bias, up, up_bias, gate_last)
    d_gate, _, d_other, _ = plain.operands(d_x, None, None if up is None else d_up, None, gate_last)
    width = gate.shape[-1]
    rows = d_out.numel() // width
    tiles, block_rows = cdiv(width, entry.constant("BLOCK_COLUMNS")), entry.constant("BLOCK_ROWS")
    most = max(PROGRAMS[other is not None] // tiles, 1)
    rows_per_program = max(cdiv(cdiv(rows, most), block_rows), 1) * block_rows
    programs, columns = cdiv(rows, rows_per_program), width if other is None else 2 * width
    partials = torch.empty((programs, columns) if has_sums else (0, columns), dtype=torch.float32, device=x.device)
    of_gate, _, of_up, _ = plain.operands(partials, None, None, None, None if other is None else bool(gate_last))
    launch.launch(
        entry,
        (tiles, programs),
        d_out_ptr=d_out.contiguous(),
        x_ptr=gate,
        up_ptr=gate if other is None else other,
        d_x_ptr=d_gate,
        d_up_ptr=d_gate if d_other is None else d_other,
        partials_ptr=of_gate,
        up_partials_ptr=of_gate if of_up is None else of_up,
        rows=rows,
        rows_per_program=rows_per_program,
        partials_units=columns // ALIGN,
        has_sums=int(has_sums),
        **_described(entry, x, width, act, gate_bias, up_bias),
    )
    return d_x, d_up, sum_partials(partials) if has_sums else partials.view(0)


def _entry(
    kernel: str, tensors: tuple[Tensor | None, ...], bias: Tensor | None, gate_last: bool | None, dtype: torch.dtype
) -> manifest.Entry | None:
    """What is compiled for these dtypes and this width; None where nothing is: PyTorch's own ops run then."""
    x, up, *_ = tensors
    assert x is not None
    width = x.shape[-1] if gate_last is None else x.shape[-1] // 2
    if dtype != x.dtype or width % ALIGN or any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors):
        return None
    if x.numel() // x.shape[-1] >= INT32_LIMIT:
        raise ValueError(f"x: {list(x.shape)} has 2^31 rows")
    gated = "gated" if up is not None or gate_last is not None else ""
    for parameters in (torch.float32 if bias is None else bias.dtype, torch.float32):
        if entry := ENTRIES.find(kernel, x.dtype, parameters, gated):
            return entry
    return None


def _described(
    entry: manifest.Entry, x: Tensor, width: int, act: str, bias: Tensor | None, up_bias: Tensor | None
) -> dict[str, Tensor | int | float]:
    """What both kernels are told of products, biases and function."""
    dtype = manifest.DTYPES[dict(entry.pointers)["bias_ptr"]]
    arguments: dict[str, Tensor | int | float] = {}
    for name, vector in (("bias", bias), ("up_bias", up_bias)):
        given = torch.empty(0, dtype=dtype, device=x.device) if vector is None else vector.to(dtype).contiguous()
        arguments |= {f"{name}_ptr": given, f"has_{name}": int(vector is not None)}
    function, linear, cubic = plain.FUNCTIONS[act]
    units = dict(width_units=width // ALIGN, stride_units=x.shape[-1] // ALIGN)
    return arguments | units | dict(function=function, linear=linear, cubic=cubic)


def _example(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _forward_call(width: int, act: str, gate_last: bool | None) -> None:
    forward(_example(256, 197, width), _example(width, dtype=torch.float32), None, None, act, gate_last, torch.bfloat16)


def _backward_call(width: int, act: str, gate_last: bool | None) -> None:
    out = width if gate_last is None else width // 2
    x, bias = _example(256, 197, width), _example(width, dtype=torch.float32)
    backward(_example(256, 197, out), x, bias, None, None, act, gate_last)


# Calls that stand for the op where launches are counted: the MLP of ViT-B/16 at 224 pixels, 256 images, under
# autocast; and a packed SwiGLU of as many features.
CALLS = {
    "bias_act forward": functools.partial(_forward_call, 3072, "gelu", None),
    "bias_act backward": functools.partial(_backward_call, 3072, "gelu", None),
    "bias_act gated forward": functools.partial(_forward_call, 4096, "silu", False),
    "bias_act gated backward": functools.partial(_backward_call, 4096, "silu", False),
}
