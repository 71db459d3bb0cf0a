"""What is tuned of `patch_embed_packed`: photographs of sizes as people have them, and how our kernels share the work.

The suite that times it beside others is packed.py, which reads other kinds of input too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import tuning
from fastvit.benchmarks import rivals, tune
from fastvit.benchmarks.rivals import Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.tuning import Configuration
from fastvit.validation.ops import tensors_of
from fastvit.validation.ops.patch_embed_packed import PackedCase

MOST_PATCHES = 256  # of a photograph
# Width and height of photographs, as cameras, phones and screens make them, and how many of 64 are such; some cropped.
PHOTOGRAPHS = (
    (640, 480, 14), (480, 640, 8), (640, 427, 10), (427, 640, 6), (500, 375, 4), (640, 360, 3), (360, 640, 2),
    (612, 612, 3), (640, 512, 2), (500, 333, 2), (640, 424, 1), (333, 500, 1), (640, 278, 1), (1024, 512, 1),
    (400, 601, 1), (640, 569, 1), (213, 640, 1), (1600, 400, 1), (375, 450, 1), (550, 640, 1),
)  # fmt: skip
NUMBER = sum(count for _, _, count in PHOTOGRAPHS)


def grid_of(width: int, height: int, most: int = MOST_PATCHES) -> tuple[int, int]:
    """Rows and columns of the most patches that keep the aspect ratio, at most `most`."""
    scale = math.sqrt(most / (width * height))
    rows, columns = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    return min(rows, most), min(columns, most // rows)


def grids(images: int, most: int = MOST_PATCHES) -> tuple[tuple[int, int], ...]:
    """Of so many photographs, at most NUMBER, in an order that mixes them."""
    listed = [grid_of(width, height, most) for width, height, count in PHOTOGRAPHS for _ in range(count)]
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0)).tolist()
    return tuple(listed[i] for i in order[:images])


@dataclass(frozen=True)
class Photographs(PackedCase):
    """As many of them as `batch` says, of at most `most` patches each; `sizes` follow from these."""

    most: int = MOST_PATCHES

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", grids(self.batch, self.most))


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    """Of larger batches the first photographs alone: PyTorch's own path goes through them one by one."""
    size = replace(size, batch=min(size.batch, NUMBER))
    for precision in scope.precisions:
        compute, images = tune.PRECISIONS[precision]
        served = Photographs(
            str(size),
            batch=size.batch,
            grid=(size.grid, size.grid),
            patch=(size.patch, size.patch),
            width=size.width,
            most=size.patches,
            images=images,
            normalise=images == "uint8",
        )
        trained = replace(served, parameters="masters")
        title = f"patch_embed_packed {size}, {precision}"
        yield Measurement(title, {tuning.FORWARD: served, tuning.TRAINING: trained}, compute)


def _problem(mode: str, inputs: Any) -> tuning.Problem:
    images, shape = tensors_of("images", inputs.tensors), tuple(inputs["weight"].shape)
    return tuning.Problem("patch_embed_packed", mode, images[0].dtype, inputs.compute, inputs.out, shape, False)


def _configurations(mode: str, inputs: Any, tile: str | None) -> Iterator[Configuration]:
    """In training splits of the weight gradient; the kernels have one tile each."""
    from fastvit.kernels.row_sums import TARGET_PROGRAMS

    if mode == tuning.FORWARD:
        yield tuning.DEFAULT
    else:
        for programs in (TARGET_PROGRAMS // 2, TARGET_PROGRAMS, 2 * TARGET_PROGRAMS):
            yield Configuration(programs=programs)


def _product_alone(inputs: Any) -> Solution:
    """Only the linear layer, on patches that were normalised and unfolded before."""
    weight, bias = inputs["weight"], inputs["bias"]
    normalise, patch = rivals.normaliser(inputs), weight.shape[2:]
    with torch.no_grad():
        cut = [rivals.patches_of(normalise(image)[None], *patch)[0] for image in tensors_of("images", inputs.tensors)]
        patches = torch.cat(cut).to(inputs.compute)  # [ΣN, C·P·P]

    def tokens() -> Tensor:
        with rivals.autocast(inputs):
            return F.linear(patches, weight.flatten(1), bias)

    return Solution(tokens, [weight, bias])


TUNED = Tuned(_measurements, _problem, _configurations, _product_alone)
