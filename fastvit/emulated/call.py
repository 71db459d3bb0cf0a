"""From tensors to a call of the emulated library: addresses, types, and which memory a kernel may touch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvit.emulated import build

_seed = 0
_library: Any = None


@contextlib.contextmanager
def emulation(*, seed: int | None = None, library: Any = None) -> Iterator[None]:
    """Inside the block, run with another schedule of threads and copies, or another build of the kernels."""
    global _seed, _library
    before = _seed, _library
    _seed = _seed if seed is None else seed
    _library = library or _library
    try:
        yield
    finally:
        _seed, _library = before


def call(name: str, inputs: Mapping[str, Tensor | None], outputs: Mapping[str, Tensor], *arguments: Any) -> None:
    """Run a function of the library. Every byte of `outputs` must be written once, nothing else may be.

    Raises:
        RuntimeError: a kernel raced, read or wrote out of bounds, or left an output incomplete; or it can't be built.
    """
    library = _library or build.library()
    buffers = [(key, *_extent(tensor), False) for key, tensor in inputs.items() if tensor is not None]
    buffers += [(key, *_extent(tensor), True) for key, tensor in outputs.items()]
    getattr(library, name)(buffers, _seed, *arguments)


def bank_conflicts() -> int:
    """How many reads of matrices from shared memory the last call would have had to repeat."""
    return int((_library or build.library()).bank_conflicts())


def type_of(dtype: torch.dtype) -> Any:
    """The library's name of a dtype."""
    return getattr((_library or build.library()).Type, str(dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address and size in bytes of the memory from the first to the last element, whatever lies between them."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()
