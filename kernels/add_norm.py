"""add_norm: residual + keep · scale · (branch + bias), and the norm of that sum, a read and a write of each.

Backward reads the gradients of both results once, writes those of residual and branch, and leaves a row of partial
sums a program for each parameter; a second launch adds these in a fixed order (row_sums.py).
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from fastvit.cpu import add_norm as plain
from fastvit.kernels import launch, manifest
from fastvit.kernels.jit import jit
from fastvit.kernels.layout import INT32_LIMIT, cdiv
from fastvit.kernels.row_sums import sum_partials

ALIGN = 8  # values that divide D and every address
# Programs of a backward: four for each of the 132 multiprocessors of an H200; a constant, so that results never vary.
PROGRAMS = 528


# Parameters may lie anywhere: optimizers and sharding cut them out of one flat buffer.
_jit = functools.partial(jit, any_address=["bias_ptr", "scale_ptr", "weight_ptr", "norm_bias_ptr", "keep_ptr"])


@_jit
def add_norm_forward(
    residual_ptr,  # [rows, D]
    branch_ptr,  # [rows, D]
    bias_ptr,  # [D], and the next three with D values in the same dtype; each is read where the call has it
    scale_ptr,
    weight_ptr,
    norm_bias_ptr,
    keep_ptr,  # [B] fp32
    sum_ptr,  # [rows, D], written with has_branch
    normed_ptr,  # [rows, D]
    statistics_ptr,  # [2, rows] fp32: mean (of an RMS norm zero), 1/deviation
    rows: tl.int32,  # B * T
    tokens: tl.int32,  # T
    width_units: tl.int32,  # D / ALIGN
    eps: tl.float32,
    centre: tl.float32,  # 1; 0 for an RMS norm
    has_branch: tl.int32,
    has_bias: tl.int32,
    has_scale: tl.int32,
    has_keep: tl.int32,
    has_norm_bias: tl.int32,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    width = width_units * ALIGN
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    in_row, is_row = d < width, m < rows
    inside = is_row[:, None] & in_row[None, :]
    place = m.to(tl.int64)[:, None] * width + d[None, :]

    branch = tl.load(branch_ptr + place, mask=inside & (has_branch != 0), other=0.0).to(tl.float32)
    branch += tl.load(bias_ptr + d, mask=in_row & (has_bias != 0), other=0.0).to(tl.float32)[None, :]
    branch *= tl.load(scale_ptr + d, mask=in_row & (has_scale != 0), other=1.0).to(tl.float32)[None, :]
    branch *= tl.load(keep_ptr + m // tokens, mask=is_row & (has_keep != 0), other=1.0)[:, None]
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    rounded = (residual + branch).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, rounded, mask=inside & (has_branch != 0))

    # The norm sees what the next block will, and what backward can start from.
    value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=1) / width * centre
    centred = tl.where(in_row[None, :], value - mean[:, None], 0.0)
    deviation = 1 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / width + eps)
    tl.store(statistics_ptr + m, mean, mask=is_row)
    tl.store(statistics_ptr + rows + m, deviation, mask=is_row)
    weight = tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + d, mask=in_row & (has_norm_bias != 0), other=0.0).to(tl.float32)
    normed = centred * deviation[:, None] * weight[None, :] + norm_bias[None, :]
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@_jit
def add_norm_backward(
    sum_ptr,  # [rows, D]
    d_normed_ptr,  # [rows, D]
    d_sum_ptr,  # [rows, D], read with has_d_sum
    branch_ptr,  # [rows, D], read with has_scale, like the next
    bias_ptr,  # [D], and the next two with D values in the same dtype
    scale_ptr,
    weight_ptr,
    keep_ptr,  # [B] fp32, read with has_keep
    statistics_ptr,  # [2, rows] fp32
    d_residual_ptr,  # [rows, D]
    d_branch_ptr,  # [rows, D], written with is_apart: where it is not d_residual itself
    partials_ptr,  # [programs, vectors, D] fp32: of weight, norm_bias, bias, scale, those that are there
    rows: tl.int32,
    rows_per_program: tl.int32,
    tokens: tl.int32,  # T
    width_units: tl.int32,  # D / ALIGN
    centre: tl.float32,  # 1; 0 for an RMS norm
    vectors: tl.int32,
    has_d_sum: tl.int32,
    has_bias: tl.int32,
    has_scale: tl.int32,
    has_keep: tl.int32,
    has_norm_bias: tl.int32,
    is_apart: tl.int32,
    ALIGN: tl.constexpr,
    SCALED: tl.constexpr,  # whether there may be a scale or factors a sample
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    width = width_units * ALIGN
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    in_row = d < width
    weight = tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        scale = tl.load(scale_ptr + d, mask=in_row & (has_scale != 0), other=1.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + d, mask=in_row & (has_bias != 0), other=0.0).to(tl.float32)[None, :]
        d_scale = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    d_norm_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    start = program * rows_per_program
    end = tl.minimum(start + rows_per_program, rows)
    for row_start in range(start, end, BLOCK_ROWS):
        m = row_start + tl.arange(0, BLOCK_ROWS)
        is_row = m < end
        inside = is_row[:, None] & in_row[None, :]
        place = m.to(tl.int64)[:, None] * width + d[None, :]
        value = tl.load(sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(d_normed_ptr + place, mask=inside, other=0.0).to(tl.float32)
        d_sum = tl.load(d_sum_ptr + place, mask=inside & (has_d_sum != 0), other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + m, mask=is_row, other=0.0)[:, None]
        deviation = tl.load(statistics_ptr + rows + m, mask=is_row, other=0.0)[:, None]

        normed = tl.where(in_row[None, :], (value - mean) * deviation, 0.0)
        d_weight += grad * normed
        d_norm_bias += grad
        grad *= weight
        along_normed = (tl.sum(grad * normed, axis=1) / width)[:, None]
        along_mean = (tl.sum(grad, axis=1) / width * centre)[:, None]
        result = d_sum + (grad - normed * along_normed - along_mean) * deviation
        tl.store(d_residual_ptr + place, result.to(d_residual_ptr.dtype.element_ty), mask=inside)
        if SCALED:
            result *= tl.load(keep_ptr + m // tokens, mask=is_row & (has_keep != 0), other=1.0)[:, None]
            branch = tl.load(branch_ptr + place, mask=inside & (has_scale != 0), other=0.0).to(tl.float32) + bias
            d_scale += tl.where(is_row[:, None], result * branch, 0.0)
            result *= scale
        d_bias += tl.where(is_row[:, None], result, 0.0)
        tl.store(d_branch_ptr + place, result.to(d_branch_ptr.dtype.element_ty), mask=inside & (is_apart != 0))

    partials = partials_ptr + program.to(tl.int64) * (vectors * width) + d
    tl.store(partials, tl.sum(d_weight, axis=0), mask=in_row)
    partials += width
    tl.store(partials, tl.sum(d_norm_bias, axis=0), mask=in_row & (has_norm_bias != 0))
    partials += has_norm_bias * width
    tl.store(partials, tl.sum(d_bias, axis=0), mask=in_row & (has_bias != 0))
    if SCALED:
        partials += has_bias * width
        tl.store(partials, tl.sum(d_scale, axis=0), mask=in_row & (has_scale != 0))


# Dtypes of residual, branch, sum, normed and parameters.
DTYPES = (
    ("fp32", "fp32", "fp32", "fp32", "fp32"),
    *(("fp32", half, "fp32", half, "fp32") for half in manifest.HALF),  # autocast
    ("bf16", "bf16", "bf16", "bf16", "fp32"),  # autocast, with a stream of its dtype
    *((half, half, half, half, half) for half in manifest.HALF),
    ("bf16", "bf16", "fp32", "bf16", "fp32"),  # the first sum behind 16-bit tokens
    ("fp32", "bf16", "fp32", "fp32", "fp32"),  # the last norm, for a head in float32
)
# Widest D, rows and warps of a forward, rows and warps of a backward: at most 128 registers, so that two programs or
# more share a multiprocessor.
TILES = ((256, (4, 4), (2, 4)), (512, (4, 4), (2, 4)), (1024, (2, 4), (1, 4)), (2048, (1, 4), (1, 8)))
ENTRIES = manifest.Entries(__name__)


def _declare() -> None:
    for residual, branch, total, normed, parameters in DTYPES:
        vectors = dict.fromkeys(("bias", "scale", "weight", "norm_bias"), parameters)
        fp32 = dict.fromkeys(("keep", "statistics"), "fp32")
        for width, (rows, warps), (backward_rows, backward_warps) in TILES:
            key = (residual, branch, total, normed, parameters, f"d{width}")
            least = 16 if width >= 512 else 0
            ENTRIES.add(
                "add_norm_forward",
                key,
                dict(residual=residual, branch=branch, sum=total, normed=normed) | vectors | fp32,
                dict(ALIGN=ALIGN, BLOCK_ROWS=rows, BLOCK_D=width),
                num_warps=warps,
                num_stages=1,
                max_registers=128,
                copies=tuple((f"{name}_ptr", least) for name in ("residual", "branch")),
            )
            for is_scaled in (False, True):
                ENTRIES.add(
                    "add_norm_backward",
                    (*key, "scaled" if is_scaled else ""),
                    dict(sum=total, d_normed=normed, d_sum=total, branch=branch, d_residual=residual, d_branch=branch)
                    | vectors | fp32 | dict(partials="fp32"),
                    dict(ALIGN=ALIGN, SCALED=is_scaled, BLOCK_ROWS=backward_rows, BLOCK_D=width),
                    num_warps=backward_warps,
                    num_stages=1,
                    max_registers=128,
                    copies=tuple((f"{name}_ptr", least) for name in ("sum", "d_normed", "d_sum")),
                )  # fmt: skip


_declare()


def forward(
    residual: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., D] residual and branch, [D] vectors, [B] keep -> sum, normed, [2, rows] statistics."""
    branch_dtype = dtype if branch is None else branch.dtype
    entry = _entry("add_norm_forward", (residual, branch), weight, residual.dtype, branch_dtype, sum_dtype, dtype)
    if entry is None:
        return plain.forward(residual, branch, bias, scale, keep, weight, norm_bias, eps, rms, sum_dtype, dtype)
    residual = residual.contiguous()
    width, device = residual.shape[-1], residual.device
    rows = residual.numel() // width
    total = torch.empty(residual.shape if branch is not None else 0, dtype=sum_dtype, device=device)
    normed = torch.empty(residual.shape, dtype=dtype, device=device)
    statistics = torch.empty(2, rows, dtype=torch.float32, device=device)
    launch.launch(
        entry,
        (cdiv(rows, entry.constant("BLOCK_ROWS")),),
        residual_ptr=residual,
        branch_ptr=_nothing(branch_dtype, device) if branch is None else branch.contiguous(),
        sum_ptr=total,
        normed_ptr=normed,
        statistics_ptr=statistics,
        rows=rows,
        tokens=_tokens(residual),
        width_units=width // ALIGN,
        eps=eps,
        centre=0.0 if rms else 1.0,
        has_branch=int(branch is not None),
        **_given(entry, device, bias=bias, scale=scale, keep=keep, weight=weight, norm_bias=norm_bias),
    )
    return total, normed, statistics


def backward(
    total: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    statistics: Tensor,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual and branch, and [vectors, D] fp32 of the vectors that are there."""
    branch_dtype = d_normed.dtype if branch is None else branch.dtype
    dtypes = residual_dtype, branch_dtype, total.dtype, d_normed.dtype
    is_scaled = scale is not None or keep is not None
    read = branch if scale is not None else None
    entry = _entry("add_norm_backward", (total, d_normed, d_total, read), weight, *dtypes, is_scaled=is_scaled)
    if entry is None:
        return plain.backward(
            total, d_normed, d_total, branch, bias, scale, keep, weight, norm_bias, statistics, rms, residual_dtype
        )
    total = total.contiguous()
    width, device = total.shape[-1], total.device
    rows = total.numel() // width
    is_apart = branch is not None and plain.is_apart(residual_dtype, branch, scale, keep)
    d_residual = torch.empty(total.shape, dtype=residual_dtype, device=device)
    d_branch = torch.empty(total.shape if is_apart else 0, dtype=branch_dtype, device=device)
    vectors = sum(vector is not None for vector in (weight, norm_bias, bias, scale))
    block_rows = entry.constant("BLOCK_ROWS")
    rows_per_program = max(cdiv(cdiv(rows, PROGRAMS), block_rows), 1) * block_rows
    partials = torch.empty(cdiv(rows, rows_per_program), vectors * width, dtype=torch.float32, device=device)
    launch.launch(
        entry,
        (partials.shape[0],),
        sum_ptr=total,
        d_normed_ptr=d_normed.contiguous(),
        d_sum_ptr=_nothing(total.dtype, device) if d_total is None else d_total.contiguous(),
        branch_ptr=_nothing(branch_dtype, device) if read is None else read.contiguous(),
        statistics_ptr=statistics,
        d_residual_ptr=d_residual,
        d_branch_ptr=d_branch,
        partials_ptr=partials,
        rows=rows,
        rows_per_program=rows_per_program,
        tokens=_tokens(total),
        width_units=width // ALIGN,
        centre=0.0 if rms else 1.0,
        vectors=vectors,
        has_d_sum=int(d_total is not None),
        is_apart=int(is_apart),
        has_norm_bias=int(norm_bias is not None),
        **_given(entry, device, bias=bias, scale=scale, keep=keep, weight=weight),
    )
    return d_residual, d_branch, sum_partials(partials).view(vectors, width)


def _entry(
    kernel: str, tensors: tuple[Tensor | None, ...], weight: Tensor, *dtypes: torch.dtype, is_scaled: bool | None = None
) -> manifest.Entry | None:
    """What is compiled for these dtypes and this width; None where nothing is: PyTorch's own ops run then."""
    width = weight.shape[0]
    tile = next((widest for widest, *_ in TILES if width <= widest), None)
    if tile is None or width % ALIGN or any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors):
        return None
    if weight.numel() and tensors[0] is not None and tensors[0].numel() // width >= INT32_LIMIT:
        raise ValueError(f"residual: {list(tensors[0].shape)} has 2^31 rows")
    rest = () if is_scaled is None else ("scaled" if is_scaled else "",)
    for parameters in (weight.dtype, torch.float32):
        if entry := ENTRIES.find(kernel, *dtypes, parameters, f"d{tile}", *rest):
            return entry
    return None


def _given(entry: manifest.Entry, device: torch.device, **vectors: Tensor | None) -> dict[str, Tensor | int]:
    """Pointers of the vectors in the entry's dtypes, and which of those that may be missing are there."""
    arguments: dict[str, Tensor | int] = {}
    for name, vector in vectors.items():
        dtype = manifest.DTYPES[dict(entry.pointers)[f"{name}_ptr"]]
        arguments[f"{name}_ptr"] = _nothing(dtype, device) if vector is None else vector.to(dtype).contiguous()
        if name != "weight":
            arguments[f"has_{name}"] = int(vector is not None)
    return arguments


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For a pointer that is not followed."""
    return torch.empty(0, dtype=dtype, device=device)


def _tokens(tensor: Tensor) -> int:
    """Rows of a sample."""
    return tensor.shape[1:-1].numel() if tensor.dim() > 1 else 1


def _example(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _forward_call() -> None:
    stream, vector = (_example(*shape, dtype=torch.float32) for shape in ((256, 197, 768), (768,)))
    forward(
        stream, _example(256, 197, 768), vector, None, None, vector, vector, 1e-6, False, stream.dtype, torch.bfloat16
    )


def _backward_call() -> None:
    total, d_total, statistics, vector = (
        _example(*shape, dtype=torch.float32) for shape in ((256, 197, 768), (256, 197, 768), (2, 256 * 197), (768,))
    )
    d_normed, branch = _example(256, 197, 768), _example(0)
    backward(total, d_normed, d_total, branch, vector, None, None, vector, vector, statistics, False, total.dtype)


# Calls that stand for the op where launches are counted: ViT-B/16 at 224 pixels, 256 images, a float32 stream.
CALLS = {"add_norm forward": _forward_call, "add_norm backward": _backward_call}
