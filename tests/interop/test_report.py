"""What a report says became one call, against what the call was given; and what it says was left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor

import fastvit
from fastvit.interop import host
from fastvit.peers import import_peer
from tests.interop.comparing import built
from tests.interop.subjects import build
from tests.interop.zoo import ENTRIES, Entry


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_words_say_what_the_call_is_given(entry: Entry, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}
    right = host.functional.patch_embed

    def noted(*args: Any, **options: Any) -> Tensor:
        given.update(options)
        return right(*args, **options)

    monkeypatch.setattr(host.functional, "patch_embed", noted)
    model = fastvit.accelerate(copy.deepcopy(built(entry)))
    entry.outputs(model, entry.images())
    (change,) = fastvit.report(model).changes
    assert change.fuses in str(fastvit.report(model))
    assert ("positions" in change.fuses) == (given["pos_embed"] is not None)
    assert ("kept patches" in change.fuses) == (given["keep"] is not None)
    if entry.name == "naflexvit-patches":
        return  # of which each sample has its own, behind the call
    rows = 0 if given["prefix"] is None else given["prefix"].shape[-2]
    single = sum(word in change.fuses for word in ("class token", "distillation token"))
    assert rows > single if "register tokens" in change.fuses else rows == single


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm-vit-avg", "projection and positions"),
        ("timm-vit-registers", "projection, positions, class token and register tokens"),
        ("timm-swin", "the projection of patches"),
        ("torchvision-vit", "projection, positions and class token"),
        ("transformers-deit", "projection, positions, class token and distillation token"),
        ("transformers-dinov2-registers", "projection, positions, class token and register tokens"),
    ],
)
def test_words(name: str, words: str):
    (change,) = fastvit.report(fastvit.accelerate(build(name))).changes
    assert change.fuses == words and str(change).endswith(f": {words} in one call")


def test_no_register_tokens():
    """A tensor without rows is none."""
    model = build("transformers-dinov3")
    embeddings = next(module for module in model.modules() if hasattr(module, "register_tokens"))
    embeddings.register_tokens.data = embeddings.register_tokens.data[:, :0]
    (change,) = fastvit.report(fastvit.accelerate(model)).changes
    assert change.fuses == "projection and class token"


def test_stages_behind_the_first_are_left_alone():
    """Their patches are of feature maps; normalisation is of the images, which have other channels."""
    model = fastvit.accelerate(build("timm-twins-pcpvt"), mean=[0.5] * 3, std=[0.5] * 3)
    report = fastvit.report(model)
    assert [change.path for change in report.changes] == ["patch_embeds.0"]
    reason = "proj takes feature maps, not images: 24 channels in patches of 2 × 2"
    assert [(refusal.path, refusal.reason) for refusal in report.refusals] == [("patch_embeds.1", reason)]


def test_images_of_many_channels_are_images():
    """As many as a patch has pixels, before any other convolution."""
    timm: Any = build("timm-vit") and import_peer("timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, in_chans=20, depths=(1, 1), num_heads=(2, 2))
    assert [change.path for change in fastvit.report(fastvit.accelerate(model)).changes] == ["patch_embed"]


def test_reasons_are_given_where_nothing_is_accelerated():
    model = build("timm-vit-patch-norm")
    assert str(fastvit.report(model)) == (
        "VisionTransformer: not accelerated\nleft as they are:\n  the model (timm.models.vision_transformer."
        "VisionTransformer): patch_embed has a norm between projection and positions"
    )
    assert str(fastvit.report(build("timm-vit"))) == "VisionTransformer: not accelerated"
