"""What becomes of mean and std: which part the weight takes up, which part the pixels, and which part the bias.

The kernels multiply W' = round(W s) with pixels x' = round((x - z) t), and whatever of the normalisation is left over
goes into the bias, where it is computed from the rounded W', which is more exact than from W:

    sum_k W_k (x_k - mean_k) / std_k = sum_k W'_k x'_k + sum_k W'_k (z_k - mean_k)       up to rounding

    images                           weight scale s      pixel shift z       pixel scale t
    uint8                            256 / (255 std)     round(255 mean)     1
    floats of the compute dtype      1 / std             0                   1
    floats to be converted           1                   mean                1 / std

uint8 pixels less an integer are exact in 16 bits, and floats of the compute dtype reach the product untouched: only
the weight is rounded. Floats that must be converted anyway, being of another dtype or multiplied at TF32 precision,
are normalised on the way, and rounded as eager PyTorch rounds them. For uint8 W' carries a factor of 256, which keeps
fp16 out of its subnormals; the forward kernel divides it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

UINT8_SCALE = 256.0  # the factor in the prepared weight of uint8 images
KEPT = 64  # tables of constants; few models have more than one or two


class ChannelConstants(NamedTuple):
    """What normalisation means for one channel, in pixel units (uint8 pixels are 0 to 255)."""

    weight_scale: float  # s
    pixel_shift: float  # z
    bias_shift: float  # what is left of the mean, for the bias: z - mean, or 0 where x' has it all
    pixel_scale: float  # t


_tables: dict[tuple[tuple[ChannelConstants, ...], torch.device], Tensor] = {}


def channel_constants(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int,
    image_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    tf32: bool = False,
) -> list[ChannelConstants]:
    """The constants of each channel for the GEMMs that read images: forward and weight gradient.

    `tf32`: the kernel rounds pixels to TF32 on the way, so that they need conversion even where the dtype is the same.
    """
    constants = []
    for channel in range(channels):
        mean_c = mean[channel] if mean is not None else 0.0
        std_c = std[channel] if std is not None else 1.0
        if image_dtype == torch.uint8:
            shift = float(min(max(round(255.0 * mean_c), 0), 255))  # beyond that x - z would not be exact in bf16
            constants.append(ChannelConstants(UINT8_SCALE / (255.0 * std_c), shift, shift - 255.0 * mean_c, 1.0))
        elif image_dtype == compute_dtype and not tf32:
            constants.append(ChannelConstants(1.0 / std_c, 0.0, -mean_c, 1.0))
        else:
            constants.append(ChannelConstants(1.0, mean_c, 0.0, 1.0 / std_c))
    return constants


def image_gradient_constants(std: Sequence[float] | None, channels: int) -> list[ChannelConstants]:
    """The constants for the GEMM that writes the image gradient: its result is scaled, and the mean plays no part."""
    return [
        ChannelConstants(1.0, 0.0, 0.0, 1.0 / (std[channel] if std is not None else 1.0)) for channel in range(channels)
    ]


def constants_on_device(constants: Sequence[ChannelConstants], device: torch.device) -> Tensor:
    """The constants as a [4, C] fp32 tensor.

    The first KEPT tables stay for the life of the process, since a CUDA graph may hold their addresses, and are
    finished before anybody sees them, so that every stream may read them without waiting. Others, and those that are
    first asked for during a capture, are filled on the current stream: two kernels, which become part of a graph.
    """
    key = (tuple(constants), device)
    if key in _tables:
        return _tables[key]
    is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if is_capturing or len(_tables) >= KEPT:
        return _fill(*key)
    # In a thread of its own: where this one's allocations go to the pool of a CUDA graph, as when torch.compile warms
    # one up, a tensor that outlives the call has no place there. Modes of this thread, too, stay out of it.
    with ThreadPoolExecutor(1) as apart:
        return _tables.setdefault(key, apart.submit(_finished, *key).result())


def _finished(constants: tuple[ChannelConstants, ...], device: torch.device) -> Tensor:
    table = _fill(constants, device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return table


def _fill(constants: tuple[ChannelConstants, ...], device: torch.device) -> Tensor:
    """By kernels that carry the values: a copy from the host would wait for the device and can't be captured."""
    with torch.inference_mode(False):
        table = torch.zeros(4, len(constants), dtype=torch.float32, device=device)
        values = [value for field in zip(*constants, strict=True) for value in field]
        torch._foreach_add_(list(table.view(-1).unbind()), values)
    return table
