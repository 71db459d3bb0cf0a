"""`verify`: it passes what is right, catches what is not, and leaves the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.interop import host
from fastvit.interop.host import Settings
from fastvit.interop.verification import VerificationError, example_images, verify_acceleration
from tests.interop.subjects import LIBRARIES, MEAN, STD, build, raw_images
from tests.interop.zoo import ENTRIES, Entry

# One of each way into a model; the whole zoo is held to more in test_parity.
SOME = [*LIBRARIES, "timm-beit", "timm-naflexvit-linear", "timm-swin", "transformers-vit-mae", "transformers-dinov3"]


@pytest.mark.parametrize("raw", [False, True], ids=["floats", "uint8"])
@pytest.mark.parametrize("name", SOME)
def test_verify_passes_what_is_right(name: str, raw: bool) -> None:
    model = build(name)
    fastvit.accelerate(model, mean=MEAN if raw else None, std=STD if raw else None, verify=True)
    assert fastvit.report(model).changes


@pytest.mark.full
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_everything_in_the_zoo_is_verified(entry: Entry) -> None:
    if entry.name in ("siglip2", "clip-with-text", "kimi-k2.5") or entry.name.startswith("qwen"):
        pytest.skip("takes more than images")
    found = verify_acceleration(build(str(entry)), Settings())
    assert found.outputs and found.gradients and not found.failures


FAULTS = {
    "no positions": {"pos_embed": None},
    "no prefix": {"prefix": None, "pos_embed": None},
    "no bias": {"bias": None},
    "no normalisation": {"mean": None, "std": None},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_verify_catches_faults_and_leaves_the_model_alone(
    name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    before = {path: type(module) for path, module in model.named_modules()}
    right = host.functional.patch_embed

    def wrong(images: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        options = {"bias": bias, **options, **FAULTS[fault]}
        tokens = right(images, weight, options.pop("bias"), **options)
        missing = images.shape[2] * images.shape[3] // weight.shape[2] ** 2 + 1 - tokens.shape[1]
        return torch.nn.functional.pad(tokens, (0, 0, missing, 0))

    monkeypatch.setattr(host.functional, "patch_embed", wrong)
    with pytest.raises(VerificationError, match="differ by more than rounding; .*; the model is unchanged"):
        fastvit.accelerate(model, mean=MEAN, std=STD, verify=True)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert not fastvit.report(model).changes


def test_a_gradient_that_is_wrong_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = host.functional.patch_embed

    def detached(images: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        return right(images, weight, None if bias is None else bias.detach(), **options)

    monkeypatch.setattr(host.functional, "patch_embed", detached)
    with pytest.raises(VerificationError, match="1 of .* the worst is patch_embed.proj.bias"):
        fastvit.accelerate(build("timm-vit"), verify=True)


def test_verification_disturbs_nothing() -> None:
    model = build("timm-vit").train()
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    fastvit.accelerate(model, verify=True)
    assert torch.equal(torch.rand(3), want), "random numbers of the caller were drawn"
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_of_ones_own() -> None:
    model = build("timm-vit")
    fastvit.accelerate(model, mean=MEAN, std=STD, verify=raw_images().permute(0, 2, 3, 1))
    names = build("transformers-vit")
    fastvit.accelerate(names, mean=MEAN, std=STD, verify={"pixel_values": raw_images()})
    assert fastvit.report(names).changes


def test_a_model_that_takes_more_than_images_needs_a_batch() -> None:
    model = build("transformers-siglip2")
    with pytest.raises(ValueError, match="verify: this model takes more than images; give a batch"):
        fastvit.accelerate(model, verify=True)
    assert not fastvit.report(model).changes


def test_frozen_and_half_precision_models_are_verified() -> None:
    frozen = build("timm-vit").requires_grad_(False)
    assert not verify_acceleration(frozen, Settings()).gradients
    half = build("timm-vit").bfloat16()
    assert not verify_acceleration(half, Settings()).failures
    double = build("timm-vit").double()
    assert not verify_acceleration(double, Settings()).failures


def test_example_images_are_what_the_model_takes() -> None:
    floats = example_images(fastvit.accelerate(build("timm-vit")), batch=3)
    raw = example_images(fastvit.accelerate(build("transformers-vit"), mean=MEAN, std=STD))
    assert floats.shape == (3, 3, 32, 32) and floats.dtype == torch.float32
    assert raw.shape == (2, 3, 32, 32) and raw.dtype == torch.uint8
