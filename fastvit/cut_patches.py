"""One tensor that holds many images, as the images that `patch_embed_packed` reads: views, without a copy.

The tensor has the pixels of all images [Σ C·H_i·W_i], one image [C, H_i, W_i] behind the other; or patches that are cut
already, [ΣN_i, K] or padded [B, N_max, K], whose K values are those of a patch. A cut patch is an image's single pixel
of K channels, that of a still a row of one of its frames, and the weight is laid out for those. Arguments are the
caller's to check.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ends_of", "gradient_of_images", "gradient_of_weight", "views", "weight_for"]

Grids = Sequence[tuple[int, int]]  # rows and columns of patches of each image


def weight_for(images: Tensor, weight: Tensor, order: str, still: bool) -> Tensor:
    """The weight that the views meet: as it is for pixels, [D, C·T·P_h·P_w, 1, 1] for patches, [D, C, 1, P_h·P_w] for
    those of stills, summed over the frames, which are all the same."""
    if images.dim() == 1:
        return weight
    if still:
        return weight.sum(2).flatten(2).unsqueeze(2)
    return (weight if order == "CPP" else weight.movedim(1, -1)).flatten(1)[:, :, None, None]


def views(images: Tensor, weight: Tensor, grids: Grids, still: bool) -> list[Tensor]:
    """Of each image what `weight_for` is for: [C, H_i, W_i]; [K, 1, N_i]; or [C, N_i, P_h·P_w]."""
    counts = [rows * columns for rows, columns in grids]
    if images.dim() == 1:
        channels, height, width = weight.shape[1:]
        parts = images.split([count * channels * height * width for count in counts])
        sides = [(rows * height, columns * width) for rows, columns in grids]
        return [part.view(channels, *each) for part, each in zip(parts, sides, strict=True)]
    if still:
        frames = images.unflatten(-1, (*weight.shape[1:3], -1))  # [..., N, C, T, P_h·P_w]
        maps = frames[..., 0, :].movedim(-2, -3)  # [C, ΣN, P_h·P_w] or [B, C, N, P_h·P_w]
        if images.dim() == 2:
            return list(maps.split(counts, 1))
        return [each[:, :count] for each, count in zip(maps.unbind(0), counts, strict=True)]
    columns = images.transpose(-1, -2).unsqueeze(-2)  # [K, 1, N] or [B, K, 1, N]
    if images.dim() == 2:
        return list(columns.split(counts, -1))
    return [each[..., :count] for each, count in zip(columns.unbind(0), counts, strict=True)]


def ends_of(grids: Grids, prefix: Tensor | None) -> list[int]:
    """Where the tokens of each image end, behind the 0 that the first begin at."""
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    return list(itertools.accumulate((prefix_rows + rows * columns for rows, columns in grids), initial=0))


def gradient_of_images(gradients: Sequence[Tensor], images: Tensor, weight: Tensor, still: bool) -> Tensor:
    """From the gradients of the views that of the pixels or [ΣN_i, K]; a still's other frames have none."""
    if not gradients:
        return images.new_zeros(images.shape)
    if images.dim() == 1:
        return torch.cat([gradient.flatten() for gradient in gradients])
    if not still:
        return torch.cat([gradient[:, 0].t() for gradient in gradients])
    frames = images.new_zeros((len(images), *weight.shape[1:3], math.prod(weight.shape[3:])))
    frames[:, :, 0] = torch.cat([gradient.transpose(0, 1) for gradient in gradients])
    return frames.flatten(1)


def gradient_of_weight(gradient: Tensor, images: Tensor, weight: Tensor, order: str, still: bool) -> Tensor:
    """From the gradient of `weight_for` that of the weight."""
    if images.dim() == 1:
        return gradient
    if still:  # every frame has had the same pixels
        dim, channels, frames, height, width = weight.shape
        return gradient.view(dim, channels, 1, height, width).expand(-1, -1, frames, -1, -1).contiguous()
    if order == "CPP":
        return gradient.reshape(weight.shape)
    dim, channels, height, width = weight.shape
    return gradient.reshape(dim, height, width, channels).movedim(-1, 1).contiguous()
