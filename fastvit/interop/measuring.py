"""How fast an accelerated model is beside the original, on this machine, in one run and in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.benchmarks.timing import Timing, interleave
from fastvit.interop.acceleration import restore, settings_of
from fastvit.interop.verification import call_with_images, example_images

__all__ = ["Speed", "measure"]


@dataclass(frozen=True)
class Speed:
    """Both times of one task, from the same images to the same result."""

    task: str
    original: Timing
    accelerated: Timing

    @property
    def ratio(self) -> float:
        """Above 1: the accelerated model is faster."""
        return self.original.median_us / self.accelerated.median_us


def measure(
    model: nn.Module, batch: int, seconds: float, progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[Speed]:
    """Time an accelerated model and a restored copy of it.

    Args:
        model: accelerated; with `mean` and `std` images are uint8, and the original normalises them first, in place,
            as loaders do on the device.
        batch: images in a batch.
        seconds: for each task.
        progress: called as progress(done, total, task).
    """
    original = restore(copy.deepcopy(model))
    images = example_images(model, batch)
    normalise = _normaliser(settings_of(model))
    kind = "uint8" if images.dtype == torch.uint8 else str(images.dtype).removeprefix("torch.")

    def tasks(subject: Any, load: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], object]]:
        found = {
            f"{kind} images to logits": lambda: _forward(subject, load(images)),
            f"{kind} images to gradients": lambda: _step(subject, load(images)),
        }
        block = _first_block(subject)
        if block is not None:
            found = {f"{kind} images to tokens": lambda: _until(block, subject, load(images)), **found}
        return found

    ours, theirs = tasks(model, lambda images: images), tasks(original, normalise)
    speeds = []
    for number, task in enumerate(ours):
        progress(number, len(ours), task)
        for subject in (model, original):
            subject.train("gradients" in task)
        before, after = interleave([theirs[task], ours[task]], images.device, seconds)
        speeds.append(Speed(task, before, after))
    return speeds


def _normaliser(settings: Any) -> Callable[[Tensor], Tensor]:
    if settings.mean is None:
        return lambda images: images
    mean, std = (torch.tensor(values).mul(255)[:, None, None] for values in (settings.mean, settings.std))
    return lambda images: images.float().sub_(mean.to(images.device)).div_(std.to(images.device))


@torch.no_grad()
def _forward(model: Any, images: Tensor) -> object:
    return call_with_images(model, images)


def _step(model: Any, images: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    output = call_with_images(model, images)
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if hasattr(output, "values") else output))
    output.float().square().mean().backward()


class _Reached(Exception):
    pass


@torch.no_grad()
def _until(block: nn.Module, model: Any, images: Tensor) -> None:
    """The forward up to this block."""

    def stop(*_: Any) -> None:
        raise _Reached

    handle = block.register_forward_pre_hook(stop)
    try:
        call_with_images(model, images)
    except _Reached:
        pass
    finally:
        handle.remove()


def _first_block(model: nn.Module) -> nn.Module | None:
    """The first block behind the embedding; None where there is no row of blocks of one class."""
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            blocks = list(module)
            if len({type(block) for block in blocks}) == 1 and any(True for _ in blocks[0].children()):
                return blocks[0]
    return None
