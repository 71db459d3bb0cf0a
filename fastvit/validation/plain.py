"""Plain PyTorch: what a user writes today, at the precision under test. Its error is the yardstick of the tolerance.

To-float, normalise, cast, convolution, gather, cat, add: every step rounds to the dtype that eager PyTorch gives it.
Shares no code with the reference or with any backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import reference
from fastvit.validation.cases import Inputs


def plain_patch_embed(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """The eager pipeline on `tensors` (those of `inputs`, perhaps as leaves that require gradients)."""
    images, weight = tensors["images"], tensors["weight"]
    assert images is not None and weight is not None
    x = images
    if x.dtype is torch.uint8:
        x = x.float() / 255
    if inputs.mean is not None and inputs.std is not None:
        x = x.float()
        x = (x - x.new_tensor(inputs.mean).view(-1, 1, 1)) / x.new_tensor(inputs.std).view(-1, 1, 1)
    # Under autocast the convolution casts for itself.
    with torch.autocast(x.device.type, inputs.compute, enabled=inputs.autocast):
        tokens = F.conv2d(x if inputs.autocast else x.to(weight.dtype), weight, _to(tensors["bias"], weight, inputs),
                          stride=(weight.shape[2], weight.shape[3]))  # fmt: skip
        tokens = tokens.flatten(2).transpose(1, 2)
        return _place(tokens, tensors["pos_embed"], tensors["prefix"], inputs.keep).to(inputs.out)


def plain_add_position(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """cat and add, as eager PyTorch promotes them."""
    tokens = tensors["tokens"]
    assert tokens is not None
    return _place(tokens, tensors["pos_embed"], tensors["prefix"], None).to(inputs.out)


def _to(bias: Tensor | None, weight: Tensor, inputs: Inputs) -> Tensor | None:
    return bias if bias is None or inputs.autocast else bias.to(weight.dtype)


def _place(tokens: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, keep: Tensor | None) -> Tensor:
    patches = tokens.shape[1]
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    on_prefix = pos_embed is not None and prefix_rows > 0 and pos_embed.shape[0] == prefix_rows + patches
    if pos_embed is not None and not on_prefix:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if pos_embed is not None and on_prefix:
        tokens = tokens + pos_embed
    if keep is None:
        return tokens
    batch, width = tokens.shape[0], tokens.shape[2]
    first = torch.arange(prefix_rows, device=keep.device).expand(batch, -1)
    rows = torch.cat([first, keep + prefix_rows], dim=1)
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, width))


def true_patch_embed(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """The reference on float64 copies: the truth."""
    images, weight = tensors["images"], tensors["weight"]
    assert images is not None and weight is not None
    return reference.patch_embed(
        images,
        weight,
        tensors["bias"],
        pos_embed=tensors["pos_embed"],
        prefix=tensors["prefix"],
        mean=inputs.mean,
        std=inputs.std,
        keep=inputs.keep,
    )


def true_add_position(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """The reference on float64 copies: the truth."""
    tokens, pos_embed = tensors["tokens"], tensors["pos_embed"]
    assert tokens is not None and pos_embed is not None
    return reference.add_position(tokens, pos_embed, prefix=tensors["prefix"])
