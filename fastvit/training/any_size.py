"""Images of any size, as NaViT trains on them (Dehghani et al., 2023).

How large an image becomes, and how images of several sizes travel as one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def grid_within(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches, `most` of them at most, that an image of height × width pixels is resized to.

    Each side is rounded to whole patches, and is at least one. Where that makes more than `most`, the shorter side
    has the largest number r of patches with r · round(r · longer / shorter) <= most, and the longer side has this
    round(…): the aspect ratio is wrong by half a patch of the longer side at most. Where even r = 1 is too long for
    `most`, the longer side has `most`. No image is enlarged by more than that rounding.

    Args:
        height, width, patch: at least 1, in pixels.
        most: at least 1.
    """
    rows, columns = max(1, round(height / patch)), max(1, round(width / patch))
    if rows * columns <= most:
        return rows, columns
    shorter, longer = sorted((height, width))
    # Without the rounding r would be √(most · shorter / longer) at most; with it, one more may fit.
    largest = math.isqrt(most * shorter // longer) + 1
    lengths = ((r, round(r * longer / shorter)) for r in range(largest, 0, -1))
    few, many = next(((r, length) for r, length in lengths if r * length <= most), (1, most))
    return (few, many) if height <= width else (many, few)


class ImageList(NamedTuple):
    """Images of any sizes in one piece of memory, which is one to share between processes, to pin and to copy.

    Attributes:
        pixels: uint8 [Σ C·H_i·W_i], one image behind the other.
        shapes: (C, H_i, W_i) of each.
    """

    pixels: Tensor
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, images: Sequence[Tensor]) -> ImageList:
        """A copy of `images`, each uint8 [C, H_i, W_i]."""
        return cls(torch.cat([image.flatten() for image in images]), [tuple(image.shape) for image in images])

    def to(self, device: torch.device, *, non_blocking: bool = False) -> list[Tensor]:
        """The images on `device`, as a model takes them."""
        parts = self.pixels.to(device, non_blocking=non_blocking).split([math.prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
