"""The known models, under timm's names and with timm's hyper-parameters."""

from __future__ import annotations

import difflib
import fnmatch
from functools import partial
from typing import Any

from torch import nn

from fastvit.model.layers import GluMlp
from fastvit.model.vision_transformer import VisionTransformer

__all__ = ["create_model", "list_models", "variant_arguments"]

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
_LETTERS = ("tiny", "small", "base", "large", "huge", "giant")  # Ti, S, B, L, H, g

# timm publishes these as encoders, without a head.
_WITHOUT_HEAD = ("vit_small_patch8_224", "vit_large_patch32_224", "vit_huge_patch14_224")

_SWIGLU: dict[str, Any] = {
    "embed_dim": 1536,
    "depth": 40,
    "num_heads": 24,
    "mlp_ratio": 2.66667 * 2,
    "mlp_layer": partial(GluMlp, act_layer=nn.SiLU, gate_last=False),
    "act_layer": nn.SiLU,
}


def _variants() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}

    def add(name: str, size: str | dict[str, Any], patch: int, image: int, **more: Any) -> None:
        architecture = _SIZES[size] if isinstance(size, str) else size
        table[name] = {"img_size": image, "patch_size": patch, **architecture, **more}

    for size in _LETTERS:
        for patch in (8, 14, 16, 32):
            name = f"vit_{size}_patch{patch}_224"
            add(name, size, patch, 224, **({"num_classes": 0} if name in _WITHOUT_HEAD else {}))
    add("vit_gigantic_patch14_224", "gigantic", 14, 224)
    for size, patch in (
        ("tiny", 16),
        ("small", 16),
        ("small", 32),
        ("base", 16),
        ("base", 32),
        ("large", 16),
        ("large", 32),
    ):
        add(f"vit_{size}_patch{patch}_384", size, patch, 384)

    for size, image in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384)):
        add(f"deit_{size}_patch16_{image}", size, 16, image)
    deit3 = {"no_embed_class": True, "init_values": 1e-6}
    for size, patch, image in (
        ("small", 16, 224),
        ("small", 16, 384),
        ("medium", 16, 224),
        ("base", 16, 224),
        ("base", 16, 384),
        ("large", 16, 224),
        ("large", 16, 384),
        ("huge", 14, 224),
    ):
        add(f"deit3_{size}_patch{patch}_{image}", size, patch, image, **deit3)

    for size in ("small", "base", "large", "giant"):
        architecture = _SWIGLU if size == "giant" else _SIZES[size]
        dinov2 = {"init_values": 1e-5, "num_classes": 0}
        registers = {"reg_tokens": 4, "no_embed_class": True}
        add(f"vit_{size}_patch14_dinov2", architecture, 14, 518, **dinov2)
        add(f"vit_{size}_patch14_reg4_dinov2", architecture, 14, 518, **dinov2, **registers)

    pooled = {"class_token": False, "global_pool": "avg"}
    add("vit_base_patch16_gap_224", "base", 16, 224, **pooled, fc_norm=False, **{"num_heads": 16})
    add("vit_huge_patch14_gap_224", "huge", 14, 224, **pooled, fc_norm=False, num_classes=0)
    add("vit_huge_patch16_gap_448", "huge", 16, 448, **pooled, fc_norm=False, num_classes=0)
    add("vit_giant_patch16_gap_224", "giant", 16, 224, **pooled, fc_norm=False, num_classes=0)
    add(
        "vit_medium_patch16_reg4_gap_256", "medium", 16, 256, **pooled, no_embed_class=True, reg_tokens=4,
        init_values=1e-5,
    )  # fmt: skip
    add("vit_base_patch16_reg4_gap_256", "base", 16, 256, **pooled, no_embed_class=True, reg_tokens=4)
    return table


_VARIANTS = _variants()


def list_models(pattern: str = "*") -> list[str]:
    """Names of the known models that match a shell pattern, in alphabetical order."""
    return sorted(fnmatch.filter(_VARIANTS, pattern))


def variant_arguments(name: str) -> dict[str, Any]:
    """The constructor arguments a name stands for.

    Raises:
        ValueError: the name is not known; the message lists near matches.
    """
    if name not in _VARIANTS:
        near = difflib.get_close_matches(name, _VARIANTS, n=5, cutoff=0.5)
        hint = f"near matches: {', '.join(near)}" if near else "fastvit.model.list_models() lists the known ones"
        raise ValueError(f"name: {name!r} is not a known model; {hint}")
    return dict(_VARIANTS[name])


def create_model(name: str, **overrides: Any) -> VisionTransformer:
    """Build a model by its timm name, with fresh weights.

    A state_dict of timm's model of the same name loads with `strict=True`.

    Args:
        name: such as "vit_tiny_patch16_224"; see :func:`list_models`.
        overrides: arguments of :class:`VisionTransformer` that replace the variant's own.

    Raises:
        ValueError: the name is not known (the message lists near matches), or an argument can't be.
    """
    return VisionTransformer(**{**variant_arguments(name), **overrides})
