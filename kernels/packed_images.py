"""Images of any sizes as kernels read them: where they lie, and one table of whole numbers that says what each is.

The table is made on the host, from shapes, strides and addresses alone; the values of no tensor are looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fastvit.kernels.layout import INT32_LIMIT, PatchLayout, cdiv


@dataclass(frozen=True)
class Images:
    """Images as kernels read them.

    `table`, [8, B] int64, has of each image its first patch row; origin, channel stride and row stride, in elements
    from the base on; patches in a row; the position of its first patch; and behind these, in the order
    of these positions, the images and the positions.
    """

    tensors: list[Tensor]  # [C, H_i, W_i]
    base: Tensor  # that of them with the lowest address
    layout: PatchLayout  # the strides and the batch's distance are what divides those of all
    table: Tensor  # on the host
    rows: int  # patches of all images
    longest: int  # patches of an image, at most
    positions: int  # behind the last one that an image has

    def folded(self) -> Images | None:
        """Images of single pixels, patches that are cut already, as images of one channel whose patches have rows: a
        step of the products covers some of them. None where they are no such images."""
        layout = self.layout
        if layout.patch_height * layout.patch_width > 1 or not layout.channels_last:
            return None
        pixel = layout.channels
        rows = _rows_of_patch(pixel)
        length = pixel // rows
        if not all(_is_row_of_pixels(tensor, pixel) for tensor in self.tensors):
            return None
        table = self.table.clone()
        table[2], table[3], table[4] = 0, length, 1
        own = replace(
            layout,
            channels=1,
            patch_height=rows,
            patch_width=length,
            channels_last=False,
            stretch=length,
            channel_stride=0,
            row_stride=length,
        )
        return replace(self, layout=own, table=table)


def read_images(images: Sequence[Tensor], starts: Sequence[int], patch: tuple[int, int]) -> Images:
    """[C, H_i, W_i] images, one at least, all of one dtype; starts: of each the position of its first patch.

    Those that do not lie as all others do, or of which one spans 2^31 elements or more, are copied.
    """
    channels, (patch_height, patch_width) = images[0].shape[0], patch
    is_nchw, is_nhwc = all(map(_is_nchw, images)), all(map(_is_nhwc, images))
    # A patch of a single pixel is a column of values in the one order, and lies in the other as it is multiplied.
    channels_last = is_nhwc and (not is_nchw or patch_height * patch_width == 1)
    tensors = [_readable(image, channels_last) for image in images]
    addresses, size = [tensor.data_ptr() for tensor in tensors], tensors[0].element_size()
    base = min(addresses)
    origins = [(address - base) // size for address in addresses]
    strides = [_strides(tensor) for tensor in tensors]
    grids = [(tensor.shape[1] // patch_height, tensor.shape[2] // patch_width) for tensor in tensors]
    counts = [rows * columns for rows, columns in grids]
    table = torch.tensor(
        [
            list(itertools.accumulate(counts, initial=0))[:-1],
            origins,
            [0 if channels_last else channel for channel, _, _ in strides],
            [row for _, row, _ in strides],
            [columns for _, columns in grids],
            starts,
            sorted(range(len(tensors)), key=lambda i: starts[i]),
            sorted(starts),
        ],
        dtype=torch.int64,
    )
    layout = PatchLayout(
        batch=len(tensors),
        channels=channels,
        patch_height=patch_height,
        patch_width=patch_width,
        grid_height=0,
        grid_width=0,
        channels_last=channels_last,
        stretch=patch_width * channels if channels_last else patch_width,
        batch_stride=math.gcd(*origins),
        channel_stride=math.gcd(*table[2].tolist()),
        row_stride=math.gcd(*table[3].tolist()),
    )
    end = max(start + count for start, count in zip(starts, counts, strict=True))
    return Images(tensors, tensors[addresses.index(base)], layout, table, sum(counts), max(counts), end)


@lru_cache
def _rows_of_patch(values: int) -> int:
    """Into how many rows to divide a patch of so many values, for steps of 4 rows of 16 values to have least to pad;
    rows of an even length before others, which are read value by value."""
    divisors = [rows for rows in range(1, values + 1) if values % rows == 0]
    return min(divisors, key=lambda rows: (values // rows % 2, cdiv(rows, 4) * cdiv(values // rows, 16), rows))


def _is_row_of_pixels(image: Tensor, pixel: int) -> bool:
    """Whether the pixels [C] of an image lie one behind the other, in one row or one column."""
    _, height, width = image.shape
    if height > 1 and width > 1:
        return False
    return max(height, width) == 1 or image.stride(2 if width > 1 else 1) == pixel


def _strides(image: Tensor) -> tuple[int, ...]:
    """Those of dimensions of size 1 mean nothing."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(image.shape, image.stride(), strict=True))


def _is_nchw(image: Tensor) -> bool:
    return image.shape[2] == 1 or image.stride(2) == 1


def _is_nhwc(image: Tensor) -> bool:
    channels, _, width = image.shape
    return (channels == 1 or image.stride(0) == 1) and (width == 1 or image.stride(2) == channels)


def _readable(image: Tensor, channels_last: bool) -> Tensor:
    """The image, or a copy that lies as said."""
    lies_so = _is_nhwc(image) if channels_last else _is_nchw(image)
    if lies_so and _extent(image) < INT32_LIMIT:
        return image
    copy = image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if channels_last else image.contiguous()
    if _extent(copy) >= INT32_LIMIT:
        raise ValueError(f"images: one image of {tuple(image.shape)} spans 2^31 elements or more")
    return copy


def _extent(image: Tensor) -> int:
    """Elements that it spans, with what a step of a product may reach beyond its last row."""
    channels, height, width = image.shape
    channel_stride, row_stride, column_stride = _strides(image)
    return channel_stride * (channels - 1) + row_stride * (height + 16) + column_stride * width
