"""One model of every library at its full size, random weights: ViT-B/16 at 224 × 224."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastvit.peers import import_peer
from tests.interop.comparing import Pair, bfloat16_outputs, float32_errors, normalised
from tests.interop.zoo import Entry

SIZES = ((224, 224),)


def timm() -> nn.Module:
    model: Any = import_peer("timm")
    return model.create_model("vit_base_patch16_224")


def torchvision() -> nn.Module:
    models: Any = import_peer("torchvision.models")
    return models.vit_b_16()


def transformers() -> nn.Module:
    vit: Any = import_peer("transformers.models.vit")
    return vit.ViTForImageClassification(vit.ViTConfig(num_labels=1000))


ENTRIES = [Entry(build.__name__, "base", "ViT-B/16", build, sizes=SIZES) for build in (timm, torchvision, transformers)]

pytestmark = [pytest.mark.full, pytest.mark.parametrize("entry", ENTRIES, ids=str)]


@pytest.mark.parametrize("train", [False, True])
def test_float32(entry: Entry, train: bool) -> None:
    pair = Pair.of(entry)
    pair.train(train)
    float32_errors(pair, entry.images(batch=2))


def test_bfloat16_autocast(entry: Entry) -> None:
    with torch.no_grad():
        bfloat16_outputs(Pair.of(entry), entry.images(batch=2).double())


def test_uint8(entry: Entry) -> None:
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    float32_errors(Pair.of(entry, raw=True), normalised(pixels, entry).float(), pixels)
