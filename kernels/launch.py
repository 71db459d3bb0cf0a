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
    with _on_device(arguments):
        kernel[grid](**arguments, **entry.constants_by_name, **entry.options)


def _on_device(arguments: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
