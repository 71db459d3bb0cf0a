"""Images of any size, as NaViT trains on them (Dehghani et al., 2023).

How large an image becomes, which images go together under a budget of tokens, and how they travel as one tensor.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .image_set import epoch_generator


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


def packed(order: Sequence[int], tokens: Sequence[int], most: int) -> list[list[int]]:
    """The images of `order` in as few batches of `most` tokens as this order allows, as even as they can be.

    Args:
        order: images by index.
        tokens: of each image by index, `most` at most.
    """
    sums = [0, *accumulate(tokens[index] for index in order)]

    def cuts(budget: int) -> list[int]:
        """Where batches begin and end that each take what `budget` has room for."""
        found = [0]
        while found[-1] < len(order):
            found.append(bisect_right(sums, sums[found[-1]] + budget) - 1)
        return found

    fewest = len(cuts(most))
    # The least budget that makes no more batches: the last one is no remainder of a few images.
    least = max((tokens[index] for index in order), default=most)
    budget = least + bisect_left(range(least, most), True, key=lambda budget: len(cuts(budget)) <= fewest)
    return [list(order[start:end]) for start, end in pairwise(cuts(budget))]


def packed_training_batches(
    tokens: Sequence[int], most: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This process's batches of one epoch: a fixed shuffle of images of so many `tokens`, `most` in a batch at most.

    The batches are packed for all processes and dealt out in turn, and the largest are halved until `world` divides
    their number: every process has as many, and every image is in one. Only where `world` does not divide the number of
    batches that have one image each, what is left over is left out.
    """
    order = torch.randperm(len(tokens), generator=epoch_generator(seed, epoch, "order")).tolist()
    batches = packed(order, tokens, most)
    while len(batches) % world and len(largest := max(batches, key=len)) > 1:
        place, half = batches.index(largest), len(largest) // 2
        batches[place : place + 1] = [largest[:half], largest[half:]]
    return batches[rank : len(batches) - len(batches) % world : world]
