"""Whoever listens to a module of an accelerated model hears what the untouched model would say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

import fastvit
from fastvit.interop.host import normalised
from tests.interop.subjects import (
    LIBRARIES,
    MEAN,
    STD,
    entry,
    error,
    expect_close,
    expect_same_gradients,
    gradients,
    launched,
    pair,
    raw_images,
)
from tests.interop.zoo import tensors

# One of every mixin, those that return more than tokens and those that read more than a projection among them.
NAMES = (
    *LIBRARIES,
    "timm-deit-distilled",
    "timm-dinov3",
    "timm-beit",
    "timm-swin",
    "timm-twins-pcpvt",
    "timm-naflexvit-conv",
    "transformers-beit",
    "transformers-dinov2-registers",
    "transformers-dinov3",
    "transformers-vit-mae",
    "transformers-clip",
    "transformers-siglip",
    "transformers-siglip2",
    "transformers-idefics3",
    "transformers-pixtral",
    "transformers-kimi-k2.5",
    "transformers-qwen3-vl",
)
INSIDE_A_BLOCK = re.compile(r"(^|\.)(blocks|layers?)\.\w+\.")  # nothing is changed there
INSIDE_A_CALL = re.compile(
    r"proj$|projection$|patch_conv$|patch_embed\w*$|patch_embed\.norm$|position_embedding$|pos_embed$|^encoder$|norm$"
)


def modules_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if not INSIDE_A_BLOCK.search(name)]


class Listener:
    """Every kind of hook on one module, and what each was given."""

    def __init__(self, module: nn.Module, backward: bool = True) -> None:
        self.heard: dict[str, list[Any]] = {}
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(lambda _, inputs: self.hear("pre", inputs)),
            module.register_forward_hook(lambda _, inputs, output: self.hear("forward", (inputs, output))),
        ]
        if backward:
            self.handles += [
                module.register_full_backward_pre_hook(lambda _, grad: self.hear("backward pre", grad)),
                module.register_full_backward_hook(lambda _, into, out: self.hear("backward", (into, out))),
            ]

    def hear(self, kind: str, value: Any) -> None:
        self.heard.setdefault(kind, []).append([tensor.detach().clone() for tensor in tensors(value)])

    def silence(self) -> None:
        for handle in self.handles:
            handle.remove()


def listen(name: str, model: nn.Module, path: str) -> tuple[dict[str, list[Any]], list[Tensor]]:
    """What is heard at a module during a forward and backward pass, and the outputs."""
    # timm adds the positions of NaFlexViT and Twins in place, which torch refuses behind a backward hook.
    adds_in_place = "naflex" in name or "twins" in name
    listener = Listener(model.get_submodule(path), backward=not adds_in_place)
    images = entry(name).images().requires_grad_()
    outputs = entry(name).outputs(model, images)
    sum(output.float().square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    listener.silence()
    return listener.heard, outputs


def expect_same_words(got: dict[str, list[Any]], want: dict[str, list[Any]]) -> None:
    assert got.keys() == want.keys()
    for kind, calls in want.items():
        assert [len(call) for call in got[kind]] == [len(call) for call in calls], kind
        for one, other in zip(sum(got[kind], []), sum(calls, []), strict=True):
            assert one.shape == other.shape and error(one, other) <= 1e-4, (kind, error(one, other))


@pytest.mark.filterwarnings("ignore:For backward hooks to be called, module output should be")
@pytest.mark.parametrize("name", NAMES)
def test_hooks_on_any_module_hear_the_same(name):
    """One module at a time, so that none is heard only because another one made the host's code run."""
    model, untouched = pair(name)
    unfused = set()
    for path in modules_of(untouched):
        want, _ = listen(name, untouched, path)
        launched()
        got, _ = listen(name, model, path)
        if launched() == 0:
            unfused.add(path)
        expect_same_words(got, want)
    # Calls go on being one of ours, but where the module lies inside that call.
    assert unfused and all(INSIDE_A_CALL.search(path) for path in unfused)
    entry(name).outputs(model, entry(name).images())
    assert launched() == 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_report_names_what_is_listened_to(name):
    model, untouched = pair(name)
    inside = {
        "timm-vit": "patch_embed",
        "torchvision-vit": "encoder",
        "transformers-vit": "vit.embeddings.patch_embeddings",
    }[name]
    assert fastvit.report(model).changes[0].unfused == ""
    listener = Listener(model.get_submodule(inside))
    (change,) = fastvit.report(model).changes
    assert f"{change.path}.{change.unfused}".removeprefix(".") == f"{inside} has hooks"
    assert f"not at present: {change.unfused}, so that calls run the library's own code" in str(fastvit.report(model))
    listener.silence()
    assert fastvit.report(model) == fastvit.report(fastvit.accelerate(untouched))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks_hear_every_module(name, register):
    model, untouched = pair(name)
    heard: list[tuple[nn.Module, Tensor]] = []
    handle = getattr(global_hooks, register)(lambda module, inputs, *_: heard.append((module, inputs[0])))
    try:
        sides = []
        for side in (untouched, model):
            heard.clear()
            names = {module: path for path, module in side.named_modules()}
            entry(name).outputs(side, entry(name).images())
            sides.append({names[module]: given for module, given in heard if isinstance(given, Tensor)})
    finally:
        handle.remove()
    want, got = sides
    assert got.keys() == want.keys() and len(want) > 20
    expect_close(list(got.values()), list(want.values()))
    assert launched() == 0
    entry(name).outputs(model, entry(name).images())
    assert launched() == 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_forward_put_on_the_projection_runs(name):
    """As libraries do that move weights in and out, or count operations."""
    model, untouched = pair(name)
    path = fastvit.report(model).changes[0].path
    projection: Any = next(module for module in model.modules() if type(module) is nn.Conv2d)
    calls: list[Tensor] = []
    original = projection.forward

    def counted(images: Tensor) -> Tensor:
        calls.append(images)
        return original(images)

    projection.forward = counted
    images = entry(name).images()
    expect_close(entry(name).outputs(model, images), entry(name).outputs(untouched, images))
    assert len(calls) == 1 and launched() == 0
    assert fastvit.report(model).changes[0].path == path and fastvit.report(model).changes[0].unfused
    del projection.forward
    entry(name).outputs(model, images)
    assert launched() == 1


class Adapter(nn.Module):
    """A low-rank addition to a projection, in the way of LoRA."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(3, 2, base.kernel_size, base.stride, bias=False)  # type: ignore[arg-type]
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.base(images) + self.up(self.down(images))


class AdapterWithWeight(Adapter):
    """transformers looks up the weight for its dtype."""

    @property
    def weight(self) -> Tensor:
        return self.base.weight


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def wrap(model: nn.Module) -> str:
    """Put an adapter around the projection."""
    path = next(path for path, module in model.named_modules() if type(module) is nn.Conv2d)
    parent, _, child = path.rpartition(".")
    torch.manual_seed(11)
    adapter = AdapterWithWeight if type(model).__module__.startswith("transformers") else Adapter
    setattr(model.get_submodule(parent), child, adapter(model.get_submodule(path)))  # type: ignore[arg-type]
    return path


def parametrize(model: nn.Module) -> str:
    path = next(path for path, module in model.named_modules() if type(module) is nn.Conv2d)
    nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())
    return path


def weight_norm(model: nn.Module) -> str:
    path = next(path for path, module in model.named_modules() if type(module) is nn.Conv2d)
    nn.utils.parametrizations.weight_norm(model.get_submodule(path))
    return path


def pruned(model: nn.Module) -> str:
    path = next(path for path, module in model.named_modules() if type(module) is nn.Conv2d)
    prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.5)
    return path


@pytest.mark.parametrize("change", [wrap, parametrize, weight_norm, pruned])
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_wrapped_around_the_projection_later_counts(name, change):
    """Adapters and parametrisations: the library's own code runs, with uint8 images too, and the report says so."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    original = entry(name).outputs(model, entry(name).images())
    path = change(model)
    change(untouched)
    images = entry(name).images()
    outputs = entry(name).outputs(model, images), entry(name).outputs(untouched, images)
    expect_close(*outputs)
    assert error(outputs[0][0], original[0]) > 1e-3 or change is weight_norm
    expect_same_gradients(gradients(model, outputs[0]), gradients(untouched, outputs[1]))
    raw = raw_images()
    launched()
    got = entry(name).outputs(model, raw)
    expect_close(got, entry(name).outputs(untouched, normalised(raw, MEAN, STD)))
    assert launched() == 0
    (reported,) = fastvit.report(model).changes
    assert f"{reported.path}.{reported.unfused}".removeprefix(".").startswith(f"{path} ")
    fastvit.restore(model)
    expect_close(entry(name).outputs(model, images), outputs[1])


def test_gradients_asked_of_the_input_embeddings():
    """What transformers registers for parameter-efficient training hears the embeddings' output."""
    model, untouched = pair("transformers-vit")
    grads = []
    for side in (model, untouched):
        side.requires_grad_(False)
        side.enable_input_require_grads()
        heard: list[Tensor] = []
        side.get_input_embeddings().register_forward_hook(lambda _, __, output, heard=heard: heard.append(output))
        outputs = entry("transformers-vit").outputs(side, entry("transformers-vit").images())
        assert outputs[0].requires_grad
        grads.append(torch.autograd.grad(outputs[0].square().sum(), heard[0], allow_unused=True))
        side.disable_input_require_grads()
    assert grads[0][0] is not None
    expect_close(grads[0], grads[1])
