"""Where the values of a patch lie in memory, and the order in which the kernels walk through them.

A patch is a list of contiguous stretches of memory: C·P_h stretches of P_w values in an NCHW image, P_h stretches of
P_w·C values in an NHWC (channels_last) image. Every stretch is cut into runs of RUN values, so that both layouts and
all patch sizes look alike to the kernels. The reduction index of the GEMM is

    k = (plane * padded_rows + row) * RUN + column

where a plane is one run of one channel (NCHW: plane = channel * runs + run; NHWC: plane = run) and padded_rows is P_h
rounded up to the ROWS rows that one step of the GEMM covers. Offsets inside a step are the same in every step; the
step itself only adds a scalar. Places of k that hold no value of the patch are padding: their weight is zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INT32_LIMIT = 2**31


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class PatchLayout:
    """The strides of an image batch, in elements, as the kernels use them. Strides of dimensions of size 1 are 0."""

    batch: int
    channels: int
    patch_height: int
    patch_width: int
    grid_height: int
    grid_width: int
    channels_last: bool
    stretch: int  # contiguous values of a patch row: P_w, or P_w·C in channels_last
    batch_stride: int
    channel_stride: int  # 0 in channels_last, where channels are part of the stretch
    row_stride: int

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return self.grid_height * self.grid_width

    @property
    def alignment(self) -> int:
        """The largest number of elements that divides every stride and the stretch."""
        return math.gcd(self.batch_stride, self.channel_stride, self.row_stride, self.stretch)


@dataclass(frozen=True)
class KOrder:
    """The reduction order of one variant of the kernels for one layout."""

    run: int
    rows: int
    runs: int  # runs in a stretch
    row_blocks: int  # steps over the rows of a plane
    steps: int

    @property
    def padded_rows(self) -> int:
        return self.row_blocks * self.rows

    @property
    def length(self) -> int:
        """Columns of the prepared weight, padding included."""
        return self.steps * self.run * self.rows


@dataclass(frozen=True)
class Variant:
    """How kernels walk through a patch, and what they may rely on."""

    run: int
    rows: int
    align: int  # elements that divide every stride
    width_align: int  # elements that divide D
    masked: bool

    @property
    def constants(self) -> dict[str, int]:
        """Of every kernel."""
        return dict(RUN=self.run, ALIGN=self.align, WIDTH_ALIGN=self.width_align)


VARIANTS = {
    "wide": Variant(run=16, rows=4, align=16, width_align=16, masked=False),  # patches 16, 32, ...
    "narrow": Variant(run=8, rows=8, align=8, width_align=16, masked=False),  # patch 8
    "masked": Variant(run=16, rows=4, align=2, width_align=16, masked=True),  # patch 14, and other even ones
    "generic": Variant(run=8, rows=4, align=1, width_align=1, masked=True),  # any patch, stride, width and address
}
PRODUCTS = (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32"))  # compute dtype and precision
IMAGES = ("u8", "bf16", "fp16", "fp32")


def copies_of(variant: str, image: str, *others: str) -> tuple[tuple[str, int], ...]:
    """What a kernel copies, and how many bytes at once where a patch is wide: those of others, and of images."""
    pixels = 8 if image == "u8" else 16
    return tuple((f"{name}_ptr", 0 if variant != "wide" else pixels if name == "images" else 16)
                 for name in ("images", *others))  # fmt: skip


def k_order(layout: PatchLayout, run: int, rows: int) -> KOrder:
    runs = cdiv(layout.stretch, run)
    row_blocks = cdiv(layout.patch_height, rows)
    planes = runs if layout.channels_last else layout.channels * runs
    return KOrder(run, rows, runs, row_blocks, planes * row_blocks)


def read_layout(images: Tensor, patch: tuple[int, int]) -> tuple[Tensor, PatchLayout]:
    """The layout of [B,C,H,W] images, and the images themselves: a contiguous copy of them where neither the values
    of a row nor those of a pixel lie side by side, or where an image spans 2^31 elements or more."""
    channels, height, width = images.shape[1:]
    batch_stride, channel_stride, row_stride, column_stride = (
        stride if size > 1 else 0 for size, stride in zip(images.shape, images.stride(), strict=True)
    )
    rows_lie_together = column_stride == 1 or width == 1
    pixels_lie_together = channel_stride == 1 and column_stride == channels
    extent = channel_stride * (channels - 1) + row_stride * (height + 16) + column_stride * width
    if not (rows_lie_together or pixels_lie_together) or extent >= INT32_LIMIT:
        if channels * (height + 16) * width >= INT32_LIMIT:
            raise ValueError(f"images: one image of {tuple(images.shape[1:])} spans 2^31 elements or more")
        return read_layout(images.clone(memory_format=torch.contiguous_format), patch)
    channels_last = not rows_lie_together
    return images, PatchLayout(
        batch=images.shape[0],
        channels=channels,
        patch_height=patch[0],
        patch_width=patch[1],
        grid_height=height // patch[0],
        grid_width=width // patch[1],
        channels_last=channels_last,
        stretch=patch[1] * channels if channels_last else patch[1],
        batch_stride=batch_stride,
        channel_stride=0 if channels_last else channel_stride,
        row_stride=row_stride,
    )
