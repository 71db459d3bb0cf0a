"""An accelerated model in everyday use: copied, saved, trained, frozen, averaged, traced, looked into."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.interop.host import normalised
from fastvit.peers import import_peer
from tests.interop.subjects import (
    LIBRARIES,
    MEAN,
    STD,
    build,
    entry,
    error,
    everything_agrees,
    expect_close,
    expect_same_gradients,
    launched,
    pair,
    raw_images,
)
from tests.interop.zoo import ENTRIES, SIZE, tensors

NAMES = [str(known) for known in ENTRIES]


def attributes(model: nn.Module) -> list[tuple[type, list[str]]]:
    return [(type(module), list(module.__dict__)) for module in model.modules()]


# Accelerate, restore, copies.


@pytest.mark.parametrize("name", NAMES)
def test_restored_exactly(name):
    """The very classes, no attribute left behind, every parameter the same object."""
    untouched = build(name)
    model = copy.deepcopy(untouched)
    parameters = list(model.named_parameters())
    arguments: dict[str, Any] = (
        {"mean": MEAN[: entry(name).channels], "std": STD[: entry(name).channels]} if entry(name).uint8 else {}
    )
    fastvit.accelerate(model, **arguments, residual_dtype=torch.bfloat16)
    assert attributes(model) != attributes(untouched) and isinstance(model, type(untouched))
    assert fastvit.restore(model) is model
    assert attributes(model) == attributes(untouched)
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    assert not fastvit.report(model).changes
    assert attributes(fastvit.restore(model)) == attributes(untouched)
    entry(name).outputs(model, entry(name).images())
    assert launched() == 0


@pytest.mark.parametrize("name", LIBRARIES)
def test_accelerated_again(name):
    """The same classes and one launch; other arguments take the place of those before."""
    model, untouched = pair(name)
    once = attributes(model)
    assert attributes(fastvit.accelerate(model)) == once
    everything_agrees(name, model, untouched)
    fastvit.accelerate(model, mean=MEAN, std=STD, residual_dtype=torch.bfloat16, backend="reference")
    change = fastvit.report(model).changes[0]
    assert (change.mean, change.std) == (MEAN, STD)
    assert (change.residual_dtype, change.backend) == ("torch.bfloat16", "reference")
    fastvit.accelerate(model)
    assert fastvit.report(model).changes[0].mean is None and attributes(model) == once
    everything_agrees(name, model, untouched)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copied, pickled, saved])
@pytest.mark.parametrize("name", [*LIBRARIES, "transformers-dinov2", "transformers-vit-mae"])
def test_copies_are_accelerated_and_independent(name, way):
    model, untouched = pair(name, mean=MEAN, std=STD)
    other = way(model)
    assert attributes(other) == attributes(model) and fastvit.report(other) == fastvit.report(model)
    everything_agrees(name, other, untouched)
    fastvit.restore(other)
    assert attributes(other) == attributes(untouched)
    everything_agrees(name, other, untouched, launches=0)
    everything_agrees(name, model, untouched)
    assert attributes(way(fastvit.restore(model))) == attributes(untouched)


@pytest.mark.parametrize("name", ["timm-vit", "transformers-vit"])
def test_another_model_of_the_same_class_is_not_accelerated(name):
    """As code does that builds a second model from the type of the first."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    if name == "timm-vit":
        other = type(model)(img_size=SIZE, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    else:
        other = type(model)(model.config)
    assert [type(module) for module in other.modules()] == [type(module) for module in untouched.modules()]
    assert not fastvit.report(other).changes
    other.eval().load_state_dict(model.state_dict())
    everything_agrees(name, other, untouched, launches=0)


def test_types_are_the_library_s():
    timm: Any = build("timm-vit") and import_peer("timm.models.vision_transformer")
    model = fastvit.accelerate(build("timm-vit"))
    assert isinstance(model, timm.VisionTransformer) and type(model).__name__ == "VisionTransformer"
    assert repr(model) == repr(build("timm-vit"))
    assert type(fastvit.restore(model)) is timm.VisionTransformer


# Training.


@pytest.mark.parametrize("name", LIBRARIES)
def test_optimizer_made_before_and_average_of_weights(name):
    model, untouched = build(name), build(name)
    optimizers = [torch.optim.SGD(side.parameters(), lr=0.01, momentum=0.9) for side in (model, untouched)]
    fastvit.accelerate(model)
    averages = [torch.optim.swa_utils.AveragedModel(side) for side in (model, untouched)]
    for _ in range(3):
        for side, optimizer, average in zip((model, untouched), optimizers, averages, strict=True):
            optimizer.zero_grad()
            loss = sum(output.square().mean() for output in entry(name).outputs(side, entry(name).images()))
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            average.update_parameters(side)
    expect_close(list(model.state_dict().values()), list(untouched.state_dict().values()))
    launched()
    got, want = (entry(name).outputs(average.module, entry(name).images()) for average in averages)
    assert launched() == 1
    expect_close(got, want)


def freeze_projection(model: nn.Module) -> None:
    next(module for module in model.modules() if type(module) is nn.Conv2d).requires_grad_(False)


def freeze_embedding(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not any(part in name for part in ("blocks.", "layers.", "layer.", "head", "norm", "classifier")):
            parameter.requires_grad_(False)


def freeze_all_but_the_head(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("head" in name or "classifier" in name)


@pytest.mark.parametrize("freeze", [freeze_projection, freeze_embedding, freeze_all_but_the_head])
@pytest.mark.parametrize("name", LIBRARIES)
def test_frozen_parameters(name, freeze):
    model, untouched = pair(name)
    freeze(model)
    freeze(untouched)
    assert sum(not parameter.requires_grad for parameter in model.parameters()) >= 2
    everything_agrees(name, model, untouched)


@pytest.mark.parametrize("name", LIBRARIES)
def test_gradient_with_respect_to_images(name):
    grads = []
    for side in pair(name):
        images = entry(name).images().requires_grad_()
        sum(output.square().sum() for output in entry(name).outputs(side, images)).backward()  # type: ignore[union-attr]
        grads.append([images.grad])
    assert launched() == 1
    expect_close(grads[0], grads[1], 1e-4)


def checkpoint_timm(model: Any) -> None:
    model.set_grad_checkpointing()


def checkpoint_transformers(model: Any) -> None:
    model.gradient_checkpointing_enable()


def checkpoint_from_outside(model: nn.Module) -> None:
    """The whole model at once: its forward, our op in it, runs again in the backward pass."""
    forward = model.forward
    model.forward = lambda images: torch.utils.checkpoint.checkpoint(forward, images, use_reentrant=False)


@pytest.mark.parametrize(
    ("name", "enable"),
    [
        ("timm-vit", checkpoint_timm),
        ("timm-beit", checkpoint_timm),
        ("timm-dinov3", checkpoint_timm),
        ("transformers-vit", checkpoint_transformers),
        ("transformers-dinov2", checkpoint_transformers),
        ("torchvision-vit", checkpoint_from_outside),
        ("timm-vit", checkpoint_from_outside),
    ],
)
def test_gradient_checkpointing(name, enable):
    model, untouched = pair(name)
    for side in (model, untouched):
        enable(side)
        side.train()
    everything_agrees(name, model, untouched)


@pytest.mark.parametrize("name", LIBRARIES)
def test_autocast(name):
    """The residual stream in float32 as the library has it, or in bfloat16 where that is asked for."""
    model, untouched = pair(name)
    images = entry(name).images()
    truth = entry(name).outputs(untouched, images)[0]
    entered: list[torch.dtype] = []
    for side in (model, untouched):
        block = next(module for path, module in side.named_modules() if path.endswith((".0", "layer_0")))
        block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = entry(name).outputs(model, images)[0], entry(name).outputs(untouched, images)[0]
        assert entered == [torch.float32, torch.float32]
        assert got.dtype == want.dtype
        assert error(got, truth) <= 2 * error(want, truth)
        entry(name).outputs(fastvit.accelerate(model, residual_dtype=torch.bfloat16), images)
        assert entered[2:] == [torch.bfloat16]


# Raw images.


@pytest.mark.parametrize("name", LIBRARIES)
def test_raw_images_and_floats_in_turn(name):
    model, untouched = pair(name, mean=MEAN, std=STD)
    raw = raw_images()
    want = entry(name).outputs(untouched, normalised(raw, MEAN, STD))
    for images in (raw, raw.permute(0, 2, 3, 1).contiguous(), raw.contiguous(memory_format=torch.channels_last)):
        launched()
        expect_close(entry(name).outputs(model, images), want)
        assert launched() == 1
    everything_agrees(name, model, untouched)


@pytest.mark.parametrize("name", LIBRARIES)
def test_empty_batch(name):
    model, untouched = pair(name)
    images = entry(name).images()[:0]
    try:
        want = entry(name).outputs(untouched, images)
    except RuntimeError as refusal:
        with pytest.raises(RuntimeError) as raised:
            entry(name).outputs(model, images)
        assert str(raised.value) == str(refusal)
        return
    got = entry(name).outputs(model, images)
    assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in want]


# Other ways to run a model.


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_traced_by_torchscript(name):
    """The library's own code is recorded."""
    model, untouched = pair(name)
    images = entry(name).images()
    traced = torch.jit.trace(model, (images,), strict=False, check_trace=False)
    assert launched() == 0 and "fastvit" not in str(traced.inlined_graph)
    with torch.no_grad():
        expect_close(tensors(traced(images)), entry(name).outputs(untouched, images))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_feature_extractors_made_by_tracing(library):
    """torch.fx records the library's own code, with the same names."""
    name = f"{library}-vit"
    model, untouched = pair(name)
    extraction: Any = import_peer("torchvision.models.feature_extraction")
    create: Any = import_peer("timm.models._features_fx") if library == "timm" else extraction
    nodes = ["blocks.0", "norm"] if library == "timm" else ["encoder.layers.encoder_layer_0", "encoder.ln"]
    assert extraction.get_graph_node_names(model) == extraction.get_graph_node_names(untouched)
    images = entry(name).images()
    got, want = (tensors(create.create_feature_extractor(side, nodes)(images)) for side in (model, untouched))
    expect_close(got, want)
    assert launched() == 0
    everything_agrees(name, model, untouched)


@pytest.mark.parametrize("name", LIBRARIES)
def test_functional_calls(name):
    """Other weights are used by the one call; under torch.func's transforms the library's own code runs."""
    model, untouched = pair(name)
    images = entry(name).images()
    weights = {key: 1.1 * value.detach() for key, value in model.named_parameters()}

    def run(side: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return tensors(torch.func.functional_call(side, weights, (images,)))[0]

    def per_sample(side: nn.Module) -> dict[str, Tensor]:
        gradient = torch.func.grad(lambda weights, image: run(side, weights, image[None]).square().sum())
        return torch.func.vmap(gradient, (None, 0))(weights, images)

    expect_close([run(model, weights, images)], [run(untouched, weights, images)])
    assert launched() == 1
    expect_same_gradients(per_sample(model), per_sample(untouched))
    assert launched() == 0


@pytest.mark.parametrize("name", LIBRARIES)
def test_forward_mode_derivatives(name):
    import torch.autograd.forward_ad as forward_ad
    from torch.nn.attention import SDPBackend, sdpa_kernel

    images = entry(name).images()
    tangents = []
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for side in pair(name):
            dual = forward_ad.make_dual(images, images.flip(0))
            tangents.append([forward_ad.unpack_dual(entry(name).outputs(side, dual)[0]).tangent])
    assert launched() == 0
    expect_close(tangents[0], tangents[1])
