"""Checks of the model's constructor arguments, made before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastvit.checks import require
from fastvit.model.initialisation import SCHEMES

__all__ = ["POOLS", "block_indices", "check_arguments", "check_pool"]

POOLS = ("", "avg", "avgmax", "max", "token", "map")
LEAST = {"in_chans": 1, "num_classes": 0, "embed_dim": 1, "depth": 0, "num_heads": 1, "reg_tokens": 0}
CHOICES: dict[str, tuple[Any, ...]] = {
    "pos_embed": ("", "none", "learn", "sincos", "rotary"),
    "weight_init": SCHEMES,
    "attn_layer": ("", "attn"),
    "residual_dtype": (None, torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


def check_pool(global_pool: str, class_token: bool) -> None:
    """Raise ValueError unless the tokens can be pooled in this way."""
    require(global_pool in POOLS, f"global_pool: {global_pool!r} is not known; accepted: {_listed(POOLS)}")
    require(class_token or global_pool != "token", "global_pool: 'token' needs class_token=True")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the argument, its value and what is accepted, where a model can't be built.

    Args:
        given: the arguments of :class:`fastvit.VisionTransformer`, by name.
    """
    for name, least in LEAST.items():
        value = given[name]
        whole = isinstance(value, int) and value >= least
        require(whole, f"{name}: {value!r} must be a whole number of at least {least}")
    check_pool(given["global_pool"], given["class_token"])
    dim, heads, ratio = given["embed_dim"], given["num_heads"], given["mlp_ratio"]
    require(dim % heads == 0, f"num_heads: {heads} does not divide embed_dim {dim}")
    require(int(dim * ratio) >= 1, f"mlp_ratio: {ratio} must be greater than 0")
    for name, accepted in CHOICES.items():
        value = given[name]
        known = value in accepted or (name == "attn_layer" and callable(value))
        require(known, f"{name}: {value!r} is not known; accepted: {_listed(accepted)}")
    fits = given["pos_embed"] != "sincos" or dim % 4 == 0
    require(fits, f"embed_dim: {dim} is not a multiple of 4, which pos_embed='sincos' needs")
    if given["pos_embed"] == "rotary":
        width = dim // heads
        require(width % 4 == 0, f"num_heads: pos_embed='rotary' needs heads of a multiple of 4 values, not {width}")
        fits = not given["patch_drop_rate"]
        require(fits, "patch_drop_rate: pos_embed='rotary' has no positions for some of the patches alone; accepted: 0")
    for name, rate in given.items():
        fits = not name.endswith("_rate") or 0.0 <= rate < 1.0
        require(fits, f"{name}: {rate} must be at least 0 and less than 1")


def block_indices(blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which blocks are meant: the last so many, the listed ones, or all."""
    if indices is None:
        indices = blocks
    if isinstance(indices, int):
        if not 0 < indices <= blocks:
            raise ValueError(f"indices: the last {indices} blocks, but there are {blocks}; accepted: 1 to {blocks}")
        return list(range(blocks - indices, blocks))
    taken = [index + blocks if index < 0 else index for index in indices]
    if not taken or not all(0 <= index < blocks for index in taken):
        raise ValueError(f"indices: {list(indices)} out of range; accepted: {-blocks} to {blocks - 1}")
    return taken


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
