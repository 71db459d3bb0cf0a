"""The weight as a matrix, with the loader's normalisation folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pixel_scale(is_uint8: bool) -> float:
    """What a pixel is divided by before mean and std apply: uint8 comes in 0..255, floats as they are."""
    return 255.0 if is_uint8 else 1.0


def pixel_mean_and_std(
    mean: Sequence[float] | None, std: Sequence[float] | None, is_uint8: bool, channels: int, centre: float = 0.0
) -> tuple[list[float], list[float]]:
    """Mean and std of each channel in the scale of pixels that `centre` has been taken off."""
    scale = pixel_scale(is_uint8)
    if mean is None or std is None:
        return [-centre] * channels, [scale] * channels
    return [scale * value - centre for value in mean], [scale * value for value in std]


def prepare_weight(
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    is_uint8: bool,
    compute_dtype: torch.dtype,
    centre: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """W' and b' such that raw pixels @ W'ᵀ + b' equals normalised pixels @ Wᵀ + b.

    With m and s the channel's mean and std in the pixel's scale, W' = round(W / s) and b' = b − Σ_k m·W'_k: the
    mean's part is taken from the rounded W', so that rounding W' costs nothing on a constant image.

    Args:
        weight: [D, C, P_h, P_w], any float dtype.
        bias: [D] or None.
        mean, std: a float a channel in the 0..1 scale, or None and None.
        is_uint8: the pixels are 0..255 rather than floats.
        compute_dtype: dtype of W'.
        centre: what has been taken off the pixels before they are multiplied.

    Returns:
        W' [D, C·P_h·P_w] in `compute_dtype`, contiguous; b' [D] float32.
    """
    dim, channels = weight.shape[:2]
    scaled = weight.to(torch.float32)
    means, stds = pixel_mean_and_std(mean, std, is_uint8, channels, centre)
    if any(value != 1.0 for value in stds):
        scaled = scaled / scaled.new_tensor(stds).view(channels, 1, 1)
    rounded = scaled.to(compute_dtype).reshape(dim, -1).contiguous()
    new_bias = rounded.new_zeros(dim, dtype=torch.float32) if bias is None else bias.to(torch.float32)
    if any(value != 0.0 for value in means):
        per_channel = rounded.view(dim, channels, -1).sum(-1, dtype=torch.float32)  # [D, C]
        new_bias = torch.addmv(new_bias, per_channel, per_channel.new_tensor(means), alpha=-1)
    # An op's outputs must not share memory with its inputs.
    return _unshared(rounded, weight), _unshared(new_bias, bias)


def _unshared(result: Tensor, source: Tensor | None) -> Tensor:
    return result.clone() if source is not None and result.data_ptr() == source.data_ptr() else result
