"""The named models: timm's hyper-parameters, and its checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastvit
from fastvit.model import create_model, list_models
from fastvit.model.variants import variant_arguments

FAMILY = (
    "vit_tiny_patch16_224",
    "vit_small_patch8_224",
    "vit_base_patch32_384",
    "vit_large_patch14_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "vit_gigantic_patch14_224",
    "deit_small_patch16_224",
    "deit3_base_patch16_384",
    "vit_small_patch14_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_base_patch16_gap_224",
    "vit_medium_patch16_reg4_gap_256",
)


def test_every_letter_and_patch_is_there():
    names = set(list_models())
    for size in ("tiny", "small", "base", "large", "huge", "giant"):
        for patch in (8, 14, 16, 32):
            assert f"vit_{size}_patch{patch}_224" in names
    assert list_models("deit3_*_384") == [f"deit3_{size}_patch16_384" for size in ("base", "large", "small")]


def test_as_timm_has_them(timm):
    """Every variant that timm has too: parameter names, shapes, and what no parameter shows."""
    compared = 0
    for name in list_models():
        if not timm.is_model(name):
            continue
        # Two blocks show every kind of parameter; the depths are compared as numbers.
        depth = variant_arguments(name)["depth"]
        with torch.device("meta"):
            ours, theirs = create_model(name, depth=2), timm.create_model(name, depth=2)
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
        for attribute in ("num_classes", "global_pool", "num_prefix_tokens", "no_embed_class", "pool_include_prefix"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), (name, attribute)
        for attribute in ("img_size", "patch_size", "grid_size"):
            assert getattr(ours.patch_embed, attribute) == getattr(theirs.patch_embed, attribute), name
        mine: Any
        for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
            assert mine.attn.num_heads == other.attn.num_heads and mine.norm1.eps == other.norm1.eps
            assert type(mine.mlp.act) is type(other.mlp.act)
            assert getattr(mine.ls1, "init_values", None) == getattr(other.ls1, "init_values", None)
        assert type(ours.fc_norm).__name__ == type(theirs.fc_norm).__name__
        assert depth == timm_depth(timm, name), name
        compared += 1
    assert compared >= 40


def timm_depth(timm, name: str) -> int:
    """The depth timm's registry gives a model, read off the call without building it."""
    from unittest import mock

    module = "deit" if name.startswith("deit") else "vision_transformer"
    target = f"timm.models.{module}._create_{module}"
    with mock.patch(target, side_effect=lambda variant, pretrained=False, **arguments: arguments["depth"]):
        return timm.models.model_entrypoint(name)(pretrained=False)


@pytest.mark.parametrize("name", FAMILY)
def test_a_timm_checkpoint_loads_strictly(name, timm):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
        state = theirs.state_dict()
    result = ours.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_loaded_from_timm_it_computes_the_same(name, timm, agree):
    theirs = timm.create_model(name, depth=2, img_size=112, num_classes=5)
    ours = create_model(name, depth=2, img_size=112, num_classes=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    agree(ours, theirs, torch.randn(2, 3, 112, 112))


@pytest.mark.full
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch32_224"])
def test_full_size(name, timm, agree):
    theirs, ours = timm.create_model(name), create_model(name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    agree(ours, theirs, torch.randn(2, 3, 224, 224))


def test_overrides():
    model = create_model("vit_tiny_patch16_224", depth=1, in_chans=1, num_classes=3, img_size=32, patch_size=8)
    assert isinstance(model, fastvit.VisionTransformer)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)
    assert variant_arguments("vit_tiny_patch16_224")["depth"] == 12  # the table is not touched


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tiny_patch16", "vit_tiny_patch16_224"),
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("zzz", "list_models"),
    ],
)
def test_an_unknown_name_lists_near_matches(name, near):
    with pytest.raises(ValueError, match="name: ") as raised:
        create_model(name)
    assert repr(name) in str(raised.value) and near in str(raised.value)
