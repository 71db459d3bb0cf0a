"""How fast a run is: images a second, how much of the device's arithmetic that is, and how long it waits for images."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

SPAN = 20.0  # seconds that a rate is of, at the most

# Dense FLOP/s in 16 bits of GPUs by a part of their names, from NVIDIA's data sheets, the longer names first.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989.5e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}

Item = TypeVar("Item")


class Rate(NamedTuple):
    """Over the last seconds.

    Attributes:
        images: a second, in all processes.
        flops: a second, in this process: those of the model, forward and backward, without what is computed again.
        waiting: share of the time that this process waited for the loader.
    """

    images: float
    flops: float
    waiting: float

    def words(self, peak: float) -> str:
        """`peak`: FLOP/s of the device, 0 where nobody knows."""
        work = f"MFU {self.flops / peak:.1%}" if peak else f"{self.flops / 1e9:,.0f} GFLOP/s"
        return f"{self.images:,.0f} img/s  {work}  loader wait {self.waiting:.0%}"


class Throughput:
    """Counts steps, and the time that goes by.

    Args:
        flops: of an image with so many tokens, in a step.
        clock: in seconds.
    """

    def __init__(self, flops: Callable[[int], float], clock: Callable[[], float] = time.perf_counter) -> None:
        self._flops, self._clock = flops, clock
        self._waited = 0.0
        self._marks: deque[tuple[float, float, float, float]] = deque([(clock(), 0.0, 0.0, 0.0)])

    def watched(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The same batches; the time until each is there counts as waiting."""
        while True:
            asked = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += self._clock() - asked
            yield batch

    def pause(self) -> None:
        """Before steps that come after something else: the time between is not theirs."""
        self._marks = deque([(self._clock(), *self._marks[-1][1:3], self._waited)])

    def count(self, images: int, tokens: list[int]) -> None:
        """A step of so many `images` in all processes, of which those with `tokens` each are this one's."""
        now, (_, before, flops, _) = self._clock(), self._marks[-1]
        self._marks.append((now, before + images, flops + sum(map(self._flops, tokens)), self._waited))
        while len(self._marks) > 2 and now - self._marks[1][0] > SPAN:
            self._marks.popleft()

    def rate(self) -> Rate:
        """Of the steps in the last SPAN seconds."""
        first, last = self._marks[0], self._marks[-1]
        seconds, *counts = (after - before for before, after in zip(first, last, strict=True))
        return Rate(*(count / seconds for count in counts)) if seconds > 0 else Rate(0.0, 0.0, 0.0)


def flops_of(model: Any) -> Callable[[int], float]:
    """Multiplications and additions of one step of a Vision Transformer on one image, by its number of tokens.

    Forward is 2 for each weight of a matrix that a token meets, and 4·T²·D for attention in each block; backward is
    twice that. Norms, activations and the optimizer are left out, as is usual.
    """
    blocks = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    in_blocks = sum(parameter.numel() for parameter in blocks)
    patch = model.patch_embed.proj.weight.numel()
    others = [module for name, module in model.named_children() if name not in ("blocks", "patch_embed")]
    once = sum(p.numel() for module in others for p in module.parameters() if p.ndim == 2)
    depth, width, prefix = len(model.blocks), model.embed_dim, model.num_prefix_tokens

    def flops(tokens: int) -> float:
        matrices = 2 * (tokens * in_blocks + (tokens - prefix) * patch + once)
        return 3.0 * (matrices + 4 * depth * tokens**2 * width)

    return flops


def tokens_of(model: Any) -> int:
    """Of an image of the model's own size."""
    return model.num_prefix_tokens + model.patch_embed.num_patches


def peak_of(device: torch.device) -> float:
    """Dense FLOP/s in 16 bits of a GPU that is known; else 0."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)
