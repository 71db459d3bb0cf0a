"""What the libraries' models offer beside a forward pass: features, hidden states, losses, folders."""

from __future__ import annotations

import copy
import filecmp
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.interop.host import normalised
from fastvit.peers import import_peer
from tests.interop.subjects import MEAN, STD, build, entry, everything_agrees, expect_close, launched, pair, raw_images
from tests.interop.zoo import SIZE, randomise, tensors


def timm_model(name: str, **options: Any) -> Any:
    timm: Any = build("timm-vit") and import_peer("timm")
    arguments = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **options}
    model = timm.create_model(name, **arguments).eval()
    randomise(model)
    return model


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "forward_intermediates": lambda model, images: model.forward_intermediates(images, return_prefix_tokens=True),
    "intermediates only": lambda model, images: model.forward_intermediates(
        images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True
    ),
    "get_intermediate_layers": lambda model, images: model.get_intermediate_layers(images, n=2, reshape=True),
    "forward_head": lambda model, images: model.forward_head(model.forward_features(images), pre_logits=True),
}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *[(name, call) for name in ("timm-vit", "timm-vit-registers") for call in CALLS],
        *[(name, call) for name in ("timm-dinov3", "timm-beit") for call in CALLS if "get" not in call],
    ],
)
def test_timm_s_other_calls(name, call):
    model, untouched = pair(name)
    images = entry(name).images()
    got = tensors(CALLS[call](model, images))
    assert launched() == 1
    expect_close(got, tensors(CALLS[call](untouched, images)))


FAMILIES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_s_features_only(name):
    untouched = timm_model(name, features_only=True, out_indices=(0, 1))
    model = fastvit.accelerate(copy.deepcopy(untouched))
    assert [change.path for change in fastvit.report(model).changes] == ["model"]
    images = entry("timm-vit").images()
    got = tensors(model(images))
    assert launched() == 1 and len(got) == 2
    expect_close(got, tensors(untouched(images)))


def test_timm_s_changes_of_size_and_depth():
    model, untouched = pair("timm-vit")
    for side in (model, untouched):
        side.set_input_size(img_size=48)
        side.prune_intermediate_layers(1)
        torch.manual_seed(4)
        side.reset_classifier(3)
    images = entry("timm-vit").images((48, 48))
    expect_close(entry("timm-vit").outputs(model, images), entry("timm-vit").outputs(untouched, images))
    assert launched() == 1


def transformers_model(module: str, config: str, cls: str, **options: Any) -> Any:
    found: Any = build("transformers-vit") and import_peer(f"transformers.models.{module}")
    arguments = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "attn_implementation": "eager",
        **options,
    }
    torch.manual_seed(0)
    model = getattr(found, cls)(getattr(found, config)(**arguments)).eval()
    randomise(model)
    return model


STAGES = {"out_features": ["stage1", "stage2"]}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Dinov2Backbone": ("dinov2.modeling_dinov2", "Dinov2Config", STAGES),
    "Dinov2WithRegistersBackbone": (
        "dinov2_with_registers.modeling_dinov2_with_registers",
        "Dinov2WithRegistersConfig",
        STAGES,
    ),
    "BeitBackbone": ("beit.modeling_beit", "BeitConfig", {**STAGES, "use_relative_position_bias": True}),
    "ViTForImageClassification": ("vit.modeling_vit", "ViTConfig", {"num_labels": 5}),
    "Dinov2ForImageClassification": ("dinov2.modeling_dinov2", "Dinov2Config", {"num_labels": 5}),
    "BeitForMaskedImageModeling": ("beit.modeling_beit", "BeitConfig", {"use_mask_token": True, "vocab_size": 11}),
    "CLIPVisionModelWithProjection": ("clip.modeling_clip", "CLIPVisionConfig", {"projection_dim": 16}),
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_transformers_outputs(cls, raw):
    """Hidden states, attentions, a loss, feature maps; a mask of patches makes the library's own code run."""
    module, config, options = CLASSES[cls]
    untouched = transformers_model(module, config, cls, **options)
    model = copy.deepcopy(untouched)
    fastvit.accelerate(model, mean=MEAN if raw else None, std=STD if raw else None)
    images = raw_images() if raw else entry("timm-vit").images()
    floats = normalised(images, MEAN, STD) if raw else images
    asked: list[dict[str, Any]] = [{}, {"output_hidden_states": True, "output_attentions": True}]
    if cls.endswith("Classification"):
        asked.append({"labels": torch.tensor([1, 2])})
    if cls.endswith("MaskedImageModeling"):
        asked.append({"bool_masked_pos": torch.arange(16)[None].expand(2, -1) % 3 == 0})
    for more in asked:
        launched()
        got = model(pixel_values=images, **more)
        assert launched() == (0 if "bool_masked_pos" in more else 1)
        want = untouched(pixel_values=floats, **more)
        assert type(got) is type(want) and list(got) == list(want)
        expect_close(tensors(got), tensors(want))


@pytest.mark.parametrize("name", ["transformers-vit", "transformers-dinov2"])
def test_transformers_folder(name, tmp_path):
    """What is written is what the untouched model writes; what is read is not accelerated, and can be."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    model.save_pretrained(tmp_path / "accelerated")
    untouched.save_pretrained(tmp_path / "untouched")
    names = sorted(path.name for path in (tmp_path / "untouched").iterdir())
    assert "config.json" in names and len(names) >= 2
    assert sorted(path.name for path in (tmp_path / "accelerated").iterdir()) == names
    for file in names:
        assert filecmp.cmp(tmp_path / "accelerated" / file, tmp_path / "untouched" / file, shallow=False), file
    for cls in (type(model), type(untouched)):
        loaded = cls.from_pretrained(tmp_path / "accelerated").eval()
        assert [type(module) for module in loaded.modules()] == [type(module) for module in untouched.modules()]
        everything_agrees(name, loaded, untouched, launches=0)
        everything_agrees(name, fastvit.accelerate(loaded), untouched)
