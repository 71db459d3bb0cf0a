"""The ops in terms of PyTorch's own: for exported programs that are to run where FastViT is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvit.ops import registry
from fastvit.ops.registry import Channels

__all__ = ["by_channel", "decompositions", "normalised"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The ops of an exported program as convolution, additions and concatenation, whatever backend it names.

    For :meth:`torch.export.ExportedProgram.run_decompositions`, alone or together with
    :func:`torch.export.default_decompositions`. The program left needs no FastViT to be loaded, run or converted.
    Backward ops have no decomposition: an exported program has none.
    """
    return {op.call.default: _laid_out(op.plain) for op in registry.OPS.values() if op.plain is not None}


def _laid_out(plain: Callable[..., Any]) -> Callable[..., Any]:
    """In the layout that an op promises, which a convolution's result, turned to tokens, does not have."""

    def run(*args: Any, **kwargs: Any) -> Any:
        results = plain(*args, **kwargs)
        if isinstance(results, tuple):
            return tuple(result.contiguous() for result in results)
        return results.contiguous()

    return run


def normalised(images: Tensor, mean: Channels, std: Channels, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels for code that takes them normalised: at float32 or better, and rounded to `dtype` once, as loaders do."""
    is_uint8 = images.dtype == torch.uint8
    if is_uint8 or mean is not None:
        wide = torch.promote_types(dtype, torch.float32)
        images = images.to(wide if is_uint8 else torch.promote_types(images.dtype, wide))
    if is_uint8:
        images = images / 255
    if mean is not None and std is not None:
        images = (images - by_channel(mean, images)) / by_channel(std, images)
    return images.to(dtype)


def by_channel(values: Channels, images: Tensor) -> Tensor:
    """[C, 1, 1], by ops that a graph can hold, an exported one or CUDA's: neither knows tensors from lists, which are
    copied from the host."""
    assert values is not None
    return torch.stack([images.new_full((1, 1), value) for value in values])
