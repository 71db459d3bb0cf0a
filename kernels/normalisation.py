"""What becomes of mean and std: which part the weight takes up, which part the pixels, and which part the bias.

The kernels multiply W' = round(W s) with pixels x' = round((x - z) t), and whatever of the normalisation is left over
goes into the bias, where it is computed from the rounded W', which is more exact than from W:

    sum_k W_k (x_k - mean_k) / std_k = sum_k W'_k x'_k + sum_k W'_k (z_k - mean_k)       up to rounding

    images                           weight scale s      pixel shift z       pixel scale t
    uint8                            256 / (255 std)     round(255 mean)     1
    floats of the compute dtype      1 / std             0                   1
    floats of another dtype          1                   mean                1 / std

uint8 pixels less an integer are exact in 16 bits, and floats of the compute dtype reach the product untouched: only
the weight is rounded. Floats that must be converted anyway are normalised on the way, and rounded as eager PyTorch
rounds them. For uint8 W' carries a factor of 256, which keeps fp16 out of its subnormals; the forward kernel divides
it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

UINT8_SCALE = 256.0  # the factor in the prepared weight of uint8 images


class ChannelConstants(NamedTuple):
    """What normalisation means for one channel, in pixel units (uint8 pixels are 0 to 255)."""

    weight_scale: float  # s
    pixel_shift: float  # z
    bias_shift: float  # what is left of the mean, for the bias: z - mean, or 0 where x' has it all
    pixel_scale: float  # t


def channel_constants(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int,
    image_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> list[ChannelConstants]:
    """The constants of each channel for the GEMMs that read images: forward and weight gradient."""
    constants = []
    for channel in range(channels):
        mean_c = mean[channel] if mean is not None else 0.0
        std_c = std[channel] if std is not None else 1.0
        if image_dtype == torch.uint8:
            shift = float(min(max(round(255.0 * mean_c), 0), 255))  # beyond that x - z would not be exact in bf16
            constants.append(ChannelConstants(UINT8_SCALE / (255.0 * std_c), shift, shift - 255.0 * mean_c, 1.0))
        elif image_dtype == compute_dtype:
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

    Made by fills rather than by a copy from the host, which would wait for the device and could not be captured in a
    CUDA graph. Kept from call to call, apart for each stream, as another stream would not wait for the fills; during
    a capture they become part of the graph and are not kept.
    """
    key = tuple(constants)
    if device.type != "cuda":
        return _filled(key, device)
    if torch.cuda.is_current_stream_capturing():
        return _fill(key, device)
    return _filled(key, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=64)
def _filled(constants: tuple[ChannelConstants, ...], device: torch.device, stream: int = 0) -> Tensor:
    return _fill(constants, device)


def _fill(constants: tuple[ChannelConstants, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        table = torch.empty(4, len(constants), dtype=torch.float32, device=device)
        for row, values in zip(table.t(), constants, strict=True):
            for cell, value in zip(row, values, strict=True):
                cell.fill_(value)
    return table
