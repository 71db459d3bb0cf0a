"""Checks of the model's constructor arguments, made before anything is built."""

from __future__ import annotations

import torch

from fastvit.checks import require
from fastvit.model.initialisation import SCHEMES

__all__ = ["POOLS", "check_arguments", "check_pool"]

POOLS = ("", "avg", "avgmax", "max", "token")
POSITIONS = ("", "none", "learn", "sincos")
RESIDUAL_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_pool(global_pool: str, class_token: bool) -> None:
    """Raise ValueError unless the tokens can be pooled in this way."""
    require(global_pool in POOLS, f"global_pool: {global_pool!r} is not known; accepted: {_listed(POOLS)}")
    require(class_token or global_pool != "token", "global_pool: 'token' needs class_token=True")


def check_arguments(
    *,
    in_chans: int,
    num_classes: int,
    global_pool: str,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    class_token: bool,
    pos_embed: str,
    reg_tokens: int,
    weight_init: str,
    residual_dtype: torch.dtype | None,
    rates: dict[str, float],
) -> None:
    """Raise ValueError, naming the argument, its value and what is accepted, where a model can't be built."""
    for name, value, least in (
        ("in_chans", in_chans, 1),
        ("num_classes", num_classes, 0),
        ("embed_dim", embed_dim, 1),
        ("depth", depth, 0),
        ("num_heads", num_heads, 1),
        ("reg_tokens", reg_tokens, 0),
    ):
        whole = isinstance(value, int) and value >= least
        require(whole, f"{name}: {value!r} must be a whole number of at least {least}")
    check_pool(global_pool, class_token)
    require(embed_dim % num_heads == 0, f"num_heads: {num_heads} does not divide embed_dim {embed_dim}")
    require(int(embed_dim * mlp_ratio) >= 1, f"mlp_ratio: {mlp_ratio} must be greater than 0")
    require(pos_embed in POSITIONS, f"pos_embed: {pos_embed!r} is not known; accepted: {_listed(POSITIONS)}")
    fits = pos_embed != "sincos" or embed_dim % 4 == 0
    require(fits, f"embed_dim: {embed_dim} is not a multiple of 4, which pos_embed='sincos' needs")
    require(weight_init in SCHEMES, f"weight_init: {weight_init!r} is not known; accepted: {_listed(SCHEMES)}")
    known = residual_dtype in RESIDUAL_DTYPES
    require(known, f"residual_dtype: {residual_dtype!r}; accepted: {', '.join(map(str, RESIDUAL_DTYPES))}")
    for name, rate in rates.items():
        require(0.0 <= rate < 1.0, f"{name}: {rate} must be at least 0 and less than 1")


def _listed(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values))
