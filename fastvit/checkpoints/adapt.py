"""A checkpoint made to fit another image size, patch size, number of channels or of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastvit.checkpoints.arguments import grid_of, plain_size
from fastvit.checkpoints.configs import is_flexi
from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.layouts import FLAX
from fastvit.checkpoints.recognition import Recognised
from fastvit.model.patch_embed import pair, resample_patch_weight
from fastvit.positions import resample_pos_embed


def adapt(recognised: Recognised, wanted: Mapping[str, Any]) -> Recognised:
    """A checkpoint for another `img_size`, `patch_size` or `in_chans`; unchanged where none differs.

    Positions are resampled as `fastvit.positions.resample_pos_embed` does it, the patch weight as in FlexiViT (both
    bicubic with antialiasing; for JAX's files and timm's FlexiViT bilinear without, as timm loads them), and channels
    are summed or repeated as in timm.

    Args:
        recognised: its positions and its patch weight have the shapes that its arguments say.
        wanted: arguments of the model to be; others than these three are ignored.

    Raises:
        ValueError: a size that can't be.
    """
    arguments, state = dict(recognised.arguments), dict(recognised.state)
    old_grid = grid_of(arguments)
    for name in ("img_size", "patch_size"):
        if name in wanted:
            arguments[name] = plain_size(name, wanted[name])
    weight = adapt_channels(state["patch_embed.proj.weight"], wanted.get("in_chans", arguments["in_chans"]))
    arguments["in_chans"] = weight.shape[1]
    is_bilinear = recognised.schema in FLAX or is_flexi(recognised.config)
    resize: dict[str, Any] = {"interpolation": "bilinear" if is_bilinear else "bicubic", "antialias": not is_bilinear}
    patch_size = pair("patch_size", arguments["patch_size"])
    state["patch_embed.proj.weight"] = resample_patch_weight(weight, patch_size, **resize)
    if "pos_embed" in state:
        prefix = 0 if arguments["no_embed_class"] else int(arguments["class_token"]) + arguments["reg_tokens"]
        state["pos_embed"] = resample_pos_embed(
            state["pos_embed"], grid_of(arguments), old_grid, num_prefix_tokens=prefix, **resize
        )
    return replace(recognised, state=state, arguments=arguments)


def adapt_head(recognised: Recognised, num_classes: int | None, new_head: bool = False) -> Recognised:
    """A checkpoint for another number of classes: without its head, or what else it has for one.

    Args:
        num_classes: 0: no head; None: as many as the checkpoint has.
        new_head: a fresh head is wanted, which the model has to bring.

    Raises:
        CheckpointError: another number of classes than the checkpoint's, without `new_head`; or a fresh head of
            unknown size.
    """
    own = recognised.arguments["num_classes"]
    if new_head and not (own if num_classes is None else num_classes):
        raise CheckpointError(f"{recognised.source}: new_head=True needs num_classes")
    if not new_head and (num_classes is None or num_classes == own != 0):
        return recognised
    if num_classes and not new_head:
        found = f"its head has {own} classes" if own else "it has no head that FastViT can use"
        accepted = f"{own}, or 0 for no head" if own else "0 for no head"
        raise CheckpointError(
            f"{recognised.source}: num_classes={num_classes}, but {found}; accepted: {accepted}; "
            "load_pretrained(new_head=True) makes a fresh head of any size"
        )
    num_classes = own if num_classes is None else num_classes
    state = {name: tensor for name, tensor in recognised.state.items() if not name.startswith("head.")}
    arguments = {**recognised.arguments, "num_classes": num_classes}
    # All that FastViT refuses belongs to a head.
    return replace(recognised, state=state, arguments=arguments, refused={})


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """The patch weight for another number of input channels, with tokens of the same scale.

    For one channel the weights are summed, so that a grey image gives the tokens of its three equal channels. For n
    channels they are repeated in turn and scaled by C / n, as timm's `adapt_input_conv` does.

    Args:
        weight: [D, C, P_h, P_w].

    Returns:
        [D, channels, P_h, P_w], computed in float32 or better, in the dtype of `weight`.

    Raises:
        ValueError: `channels` is not positive.
    """
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"in_chans: {channels!r} must be a whole number of at least 1")
    own = weight.shape[1]
    if channels == own:
        return weight
    wide = weight.float() if weight.dtype.itemsize < 4 else weight
    if channels == 1:
        return wide.sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = wide.repeat(1, math.ceil(channels / own), 1, 1)[:, :channels]
    return (repeated * (own / channels)).to(weight.dtype)
