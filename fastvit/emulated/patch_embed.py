"""`patch_embed` by the emulated kernels; the same arguments as every backend's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cpu.patch_embed import make_table
from fastvit.emulated.add_position import sum_rows
from fastvit.emulated.call import address, call, type_of
from fastvit.kernels.layout import PatchLayout, cdiv, read_layout
from fastvit.kernels.normalisation import UINT8_SCALE, ChannelConstants, channel_constants

Normalisation = Sequence[float] | None
WEIGHT_ALIGN = 8  # values a row of the prepared weight is a multiple of: 16 bytes
SPLIT_ROWS = 128  # patches a split of the weight gradient sums: few, so that small tests have several splits


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Normalisation,
    std: Normalisation,
    keep: Tensor | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] → [B, R+N, D]; arguments as in `fastvit.functional.patch_embed`, already checked.

    An index in `keep` that is out of range gives a row of NaN, as it does on a GPU.
    """
    images, layout = read_layout(images, (weight.shape[2], weight.shape[3]))
    constants = channel_constants(mean, std, layout.channels, images.dtype, compute_dtype)
    matrix, full_bias = prepare_weight(weight, bias, constants, images.dtype == torch.uint8, compute_dtype, layout)
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    table = make_table(full_bias, pos_embed, prefix, layout.patches)
    kept = layout.patches if keep is None else keep.shape[1]
    tokens = images.new_empty((layout.batch, prefix_rows + kept, weight.shape[0]), dtype=dtype)
    if tokens.numel() == 0:
        return tokens
    is_converted = images.dtype != compute_dtype
    normaliser = _normaliser(constants, layout, matrix.shape[1]) if is_converted else None
    inputs = {"images": images, "weight": matrix, "table": table, "normaliser": normaliser, "keep": _contiguous(keep)}
    outputs = {"tokens": tokens}
    call(
        "patch_embed",
        inputs,
        outputs,
        type_of(images.dtype),
        type_of(compute_dtype),
        type_of(dtype),
        {name: address(tensor) for name, tensor in (inputs | outputs).items()},
        _sizes(layout, kept, prefix_rows, weight, matrix.shape[1]),
        1.0 / UINT8_SCALE if images.dtype == torch.uint8 else 1.0,
    )
    return tokens


def weight_gradient(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Normalisation,
    std: Normalisation,
    keep: Tensor | None,
    prefix_rows: int,
) -> Tensor:
    """[D, C, P_h, P_w] float32, from grad [B, R+N, D] in the dtype that the product is made in."""
    dim, channels, height, width = weight.shape
    images, layout = read_layout(images, (height, width))
    constants = channel_constants(mean, std, channels, images.dtype, grad.dtype)
    grad, keep = grad.contiguous(), _contiguous(keep)
    kept = grad.shape[1] - prefix_rows
    rows, length = layout.batch * kept, cdiv(weight[0].numel(), WEIGHT_ALIGN) * WEIGHT_ALIGN
    if rows == 0:
        return weight.new_zeros(weight.shape, dtype=torch.float32)
    parts = grad.new_empty((cdiv(rows, SPLIT_ROWS), dim, length), dtype=torch.float32)
    normaliser = _normaliser(constants, layout, length) if images.dtype != grad.dtype else None
    inputs = {"images": images, "normaliser": normaliser, "keep": keep, "grad": grad}
    outputs = {"parts": parts}
    call(
        "weight_gradient",
        inputs,
        outputs,
        type_of(images.dtype),
        type_of(grad.dtype),
        {name: address(tensor) for name, tensor in (inputs | outputs).items()},
        _sizes(layout, kept, prefix_rows, weight, length),
        SPLIT_ROWS,
    )
    total = sum_rows(parts.view(parts.shape[0], -1)).view(dim, length)[:, : weight[0].numel()]
    if layout.channels_last:
        total = total.view(dim, height, width, channels).permute(0, 3, 1, 2)
    else:
        total = total.view(weight.shape)
    d_bias = _patch_gradients(grad, keep, layout.patches, prefix_rows).sum((0, 1))  # [D]
    scale, shift = (total.new_tensor([c[field] for c in constants])[:, None, None] for field in (0, 2))
    total = (total + d_bias[:, None, None, None] * shift) * scale
    return total / UINT8_SCALE if images.dtype == torch.uint8 else total


def prepare_weight(
    weight: Tensor,
    bias: Tensor | None,
    constants: Sequence[ChannelConstants],
    is_uint8: bool,
    compute_dtype: torch.dtype,
    layout: PatchLayout,
) -> tuple[Tensor, Tensor]:
    """W' [D, k_padded] in the compute dtype and in the images' order, zero behind its length; b' [D] float32."""
    scale, shift = (weight.new_tensor([c[field] for c in constants], dtype=torch.float32) for field in (0, 2))
    rounded = (weight.float() * scale[:, None, None]).to(compute_dtype)  # [D, C, P_h, P_w]
    correction = (rounded.float() * shift[:, None, None]).sum((1, 2, 3))
    full_bias = correction / UINT8_SCALE if is_uint8 else correction
    if bias is not None:
        full_bias = full_bias + bias.float()
    ordered = rounded.permute(0, 2, 3, 1) if layout.channels_last else rounded
    matrix = ordered.reshape(weight.shape[0], -1)
    padding = cdiv(matrix.shape[1], WEIGHT_ALIGN) * WEIGHT_ALIGN - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, padding)).contiguous(), full_bias


def _patch_gradients(grad: Tensor, keep: Tensor | None, patches: int, prefix_rows: int) -> Tensor:
    """The gradients of the patches, in float32, those of patches that do not exist left out."""
    rows = grad[:, prefix_rows:].float()
    return rows if keep is None else rows * ((keep >= 0) & (keep < patches))[:, :, None]


def _contiguous(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.contiguous()


def _sizes(layout: PatchLayout, kept: int, prefix_rows: int, weight: Tensor, k_padded: int) -> dict[str, int]:
    return {
        "batch_stride": layout.batch_stride,
        "plane_stride": layout.channel_stride,
        "row_stride": layout.row_stride,
        "batch": layout.batch,
        "grid_width": layout.grid_width,
        "patches": layout.patches,
        "kept": kept,
        "prefix_rows": prefix_rows,
        "width": weight.shape[0],
        "stretch": layout.stretch,
        "patch_height": layout.patch_height,
        "k_length": weight[0].numel(),
        "k_padded": k_padded,
    }


def _normaliser(constants: Sequence[ChannelConstants], layout: PatchLayout, length: int) -> Tensor:
    """[2, length] float32: shift and scale of the pixel at every k, in the images' order."""
    values = torch.tensor([(c.pixel_shift, c.pixel_scale) for c in constants]).t()  # [2, C]
    if layout.channels_last:
        every = values.repeat(1, layout.patch_height * layout.patch_width)
    else:
        every = values.repeat_interleave(layout.patch_height * layout.patch_width, dim=1)
    return torch.nn.functional.pad(every, (0, length - every.shape[1])).contiguous()
