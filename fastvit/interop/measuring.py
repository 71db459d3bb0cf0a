"""How fast an accelerated model is beside the original, on this machine, in one run and in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.benchmarks.problem import steady
from fastvit.benchmarks.rivals import loader
from fastvit.benchmarks.timing import Call, Timing, interleave
from fastvit.interop.acceleration import restore, settings_of
from fastvit.interop.verification import call_with_images, example_images

__all__ = ["GRADIENTS", "LOGITS", "TOKENS", "Speed", "measure", "task_of"]

TOKENS, LOGITS, GRADIENTS = TASKS = ("to tokens", "to logits", "to gradients")


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
    settings = settings_of(model)
    load = loader(settings.mean, settings.std, images.device)
    kind = "uint8" if images.dtype == torch.uint8 else str(images.dtype).removeprefix("torch.")
    tasks = TASKS if _first_block(model) is not None else (LOGITS, GRADIENTS)
    speeds = []
    with steady(images.device):
        for number, task in enumerate(tasks):
            name = f"{kind} images {task}"
            progress(number, len(tasks), name)
            calls = [task_of(original, task, images, load), task_of(model, task, images)]
            speeds.append(Speed(name, *interleave(calls, images.device, seconds)))
    return speeds


def task_of(
    model: nn.Module, task: str, images: Tensor, load: Callable[[Tensor], Tensor] = lambda images: images
) -> Call:
    """A call that takes the images as far as the task says.

    Args:
        model: it is put into train mode for GRADIENTS, else into eval mode.
        task: TOKENS, until the first block; LOGITS; or GRADIENTS, of every parameter.
        load: what is done to the images before the model sees them; a part of the call.
    """
    model.train(task == GRADIENTS)
    block = _first_block(model)
    if task == GRADIENTS:
        return lambda: _step(model, load(images))
    if task == TOKENS and block is not None:
        return lambda: _until(block, model, load(images))
    return lambda: _forward(model, load(images))


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
