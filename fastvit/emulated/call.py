"""From tensors to a call of the emulated library, and which GPU it is to resemble."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvit.emulated import build


@dataclass(frozen=True)
class Emulation:
    """How kernels are run: `seed` sets the order of threads and copies, `processors` and `capability` (10 · major +
    minor) are what launches are told of the GPU, `tf32` whether float32 products may be made at TF32 precision."""

    seed: int = 0
    processors: int = 132
    capability: int = 80
    tf32: bool = False
    library: Any = None


_current = Emulation()


@contextlib.contextmanager
def emulation(**changes: Any) -> Iterator[None]:
    """Inside the block, run with other fields of :class:`Emulation`; `library` is another build of the kernels."""
    global _current
    before, _current = _current, replace(_current, **changes)
    try:
        yield
    finally:
        _current = before


def current() -> Emulation:
    """The emulation that calls are made with."""
    return _current


def library() -> Any:
    """The module of the kernels: the one of :func:`emulation`, or the build for this checkout."""
    return _current.library or build.library()


def device() -> Any:
    """What the library is told of the GPU."""
    return library().Device(_current.seed, _current.processors, _current.capability)


def view(tensor: Tensor | None) -> Any:
    """A tensor as the library sees it."""
    if tensor is None:
        return library().View()
    return library().View(tensor.data_ptr(), type_of(tensor.dtype), list(tensor.shape), list(tensor.stride()))


def type_of(dtype: torch.dtype) -> Any:
    """The library's name of a dtype."""
    return getattr(library().Type, str(dtype).removeprefix("torch."))


def bank_conflicts() -> int:
    """How many reads from shared memory would have had to be repeated, since this was last asked."""
    return int(library().bank_conflicts())
