"""Launching a kernel: the one way from a launcher to the GPU, open to nothing but entries of the manifest."""

from __future__ import annotations

import contextlib
import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels.manifest import Entry


@cache
def jit_function(entry: Entry) -> Any:
    """The jitted function of an entry."""
    return getattr(importlib.import_module(f"fastvit.kernels.{entry.module}"), entry.function)


def launch(entry: Entry, grid: tuple[int, ...], *, reads: Any = (), **arguments: Any) -> None:
    """Run the kernel of a manifest entry on the device of its tensors, on that device's current stream.

    `reads`: tensors that it finds by addresses beside those it is given; for who counts what is read.
    """
    if 0 in grid:
        return
    kernel = jit_function(entry)
    device = next(value for value in arguments.values() if isinstance(value, Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **entry.constants_by_name, **entry.options(target_of(device)))


@cache
def target_of(device: torch.device) -> int:
    """The compute capability of a GPU, times ten; 0 of a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
