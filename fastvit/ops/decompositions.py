"""The ops in terms of PyTorch's own: for exported programs that are to run where FastViT is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit import reference
from fastvit.ops import registry
from fastvit.ops.add_position import add_position
from fastvit.ops.patch_embed import patch_embed

__all__ = ["by_channel", "decompositions", "normalised", "plain_patch_embed"]


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """The ops of an exported program as convolution, additions and concatenation, whatever backend it names.

    For :meth:`torch.export.ExportedProgram.run_decompositions`, alone or together with
    :func:`torch.export.default_decompositions`. The program left needs no FastViT to be loaded, run or converted.
    Backward ops have no decomposition: an exported program has none.
    """
    return {patch_embed.default: _patch_embed, add_position.default: _add_position}


def plain_patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """The op `patch_embed` by its reference, at the precision asked for."""
    with registry.without_autocast(images.device.type):
        if compute_dtype is not torch.float64:  # the reference copies mean and std from the host: never in a graph
            images, mean, std = normalised(images, mean, std, compute_dtype), None, None
        return reference.patch_embed(
            images,
            weight.to(compute_dtype),
            None if bias is None else bias.to(compute_dtype),
            pos_embed=pos_embed,
            prefix=prefix,
            mean=mean,
            std=std,
            keep=keep,
            dtype=dtype,
        )


def _patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    images = normalised(images, mean, std, compute_dtype)
    tokens = plain_patch_embed(images, weight, bias, pos_embed, prefix, keep, None, None, compute_dtype, dtype)
    # In the layout that the op promises, which a convolution's result, turned to tokens, does not have.
    return tokens.contiguous()


def _add_position(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    return reference.add_position(tokens, pos_embed, prefix=prefix, dtype=dtype).contiguous()


def normalised(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pixels for code that takes them normalised: at float32, and rounded to `dtype` once, as loaders do it."""
    is_uint8 = images.dtype == torch.uint8
    if is_uint8 or mean is not None:
        images = images.to(torch.promote_types(images.dtype, torch.float32))
    if is_uint8:
        images = images / 255
    if mean is not None and std is not None:
        images = (images - by_channel(mean, images)) / by_channel(std, images)
    return images.to(dtype)


def by_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """[C, 1, 1], by ops that a graph can hold, an exported one or CUDA's: neither knows tensors from lists, which are
    copied from the host."""
    return torch.stack([images.new_full((1, 1), value) for value in values])
