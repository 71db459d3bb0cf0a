"""What is changed in a model after it was accelerated counts, as it does in the library's model."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit import guards
from fastvit.interop import acceleration, planning
from fastvit.interop.host import normalised
from fastvit.peers import import_peer
from tests.interop.subjects import (
    LIBRARIES,
    MEAN,
    STD,
    build,
    entry,
    expect_close,
    expect_same_gradients,
    gradients,
    launched,
    pair,
    raw_images,
)

PROJECTION = {
    "timm-vit": "patch_embed.proj",
    "timm-vit-dynamic-size": "patch_embed.proj",
    "timm-beit": "patch_embed.proj",
    "timm-swin": "patch_embed.proj",
    "timm-naflexvit-conv": "embeds.proj",
    "torchvision-vit": "conv_proj",
    "transformers-vit": "vit.embeddings.patch_embeddings.projection",
    "transformers-dinov2": "dinov2.embeddings.patch_embeddings.projection",
    "transformers-dinov3": "embeddings.patch_embeddings",
    "transformers-vit-mae": "vit.embeddings.patch_embeddings.projection",
    "transformers-clip": "vision_model.embeddings.patch_embedding",
    "transformers-idefics3": "embeddings.patch_embedding",
    "transformers-pixtral": "patch_conv",
}

Change = Callable[[Any, str], Any]


def outcome(name: str, model: nn.Module, images: Tensor) -> list[Tensor] | str:
    """The outputs, or the error in the library's words."""
    try:
        return entry(name).outputs(model, images)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def expect_the_library_s(name: str, model: nn.Module, untouched: nn.Module, launches: int = 0) -> None:
    """Outputs and gradients of floats and of raw pixels, or the same error; by the library's own code."""
    raw = raw_images()
    floats = normalised(raw, MEAN, STD)
    want = outcome(name, untouched, floats)
    for images in (floats, raw, raw.permute(0, 2, 3, 1)):
        launched()
        got = outcome(name, model, images)
        if isinstance(want, str):
            assert got == want
            continue
        assert not isinstance(got, str), got
        assert launched() == launches
        expect_close(got, want)
        if want[0].requires_grad:
            expect_same_gradients(gradients(model, got), gradients(untouched, outcome(name, untouched, floats)))


def expect_one_warning(name: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(guards, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            outcome(name, model, raw_images())
    said = [str(warning.message) for warning in caught if str(warning.message).startswith("fastvit:")]
    assert len(said) == 1, said
    return said[0]


def halved_stride(model: Any, path: str) -> None:
    projection = model.get_submodule(path)
    projection.stride = tuple(size // 2 for size in projection.kernel_size)


def padded(model: Any, path: str) -> None:
    model.get_submodule(path).padding = (4, 4)


def dilated(model: Any, path: str) -> None:
    model.get_submodule(path).dilation = (2, 2)


def another_convolution(model: Any, path: str) -> None:
    torch.manual_seed(6)
    old = model.get_submodule(path)
    model.set_submodule(path, nn.Conv2d(3, old.out_channels, 12, old.stride, padding=2))


class Twice(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def of_a_subclass(model: Any, path: str) -> None:
    model.get_submodule(path).__class__ = Twice


class Adapter(nn.Module):
    """As adapters are: the projection inside, more beside, and its attributes in sight."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        torch.manual_seed(6)
        self.more = nn.Conv2d(base.in_channels, base.out_channels, base.kernel_size, base.stride, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.base(images) + self.more(images)


def adapted(model: Any, path: str) -> None:
    model.set_submodule(path, Adapter(model.get_submodule(path)))


def own_forward(model: Any, path: str) -> None:
    projection = model.get_submodule(path)
    projection.forward = types.MethodType(lambda self, x: 3 * nn.Conv2d.forward(self, x), projection)


class Quantised(Tensor):
    """A parameter of a class of its own, as quantised and sharded ones are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(Tensor) if func is torch.conv2d else result


def of_a_tensor_class(model: Any, path: str) -> None:
    projection = model.get_submodule(path)
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Quantised))
    projection.weight.requires_grad_(False)


GEOMETRY = (halved_stride, padded, dilated, another_convolution)
CODE = (of_a_subclass, adapted, own_forward, of_a_tensor_class)


@pytest.mark.parametrize("change", [*GEOMETRY, *CODE])
@pytest.mark.parametrize("name", PROJECTION)
def test_changed_projection(name: str, change: Change, monkeypatch: pytest.MonkeyPatch):
    model, untouched = pair(name, mean=MEAN, std=STD)
    before = outcome(name, untouched, normalised(raw_images(), MEAN, STD))
    for side in (model, untouched):
        change(side, PROJECTION[name])
    after = outcome(name, untouched, normalised(raw_images(), MEAN, STD))
    assert isinstance(after, str) or after[0].shape != before[0].shape or not torch.equal(after[0], before[0])
    expect_the_library_s(name, model, untouched)
    (reported,) = fastvit.report(model).changes
    assert any(part in reported.unfused for part in ("proj", "patch_embed", "patch_conv"))
    assert reported.unfused in str(reported) and reported.unfused in expect_one_warning(name, model, monkeypatch)
    fastvit.restore(model)
    floats = normalised(raw_images(), MEAN, STD)
    assert str(outcome(name, model, floats)) == str(outcome(name, untouched, floats))


@pytest.mark.parametrize("name", PROJECTION)
def test_projection_of_other_patches(name: str):
    """Which neither overlap nor lie apart, but are not those that the host counts."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    for side in (model, untouched):
        torch.manual_seed(6)
        old = side.get_submodule(PROJECTION[name])
        size = old.kernel_size[0] // 2
        side.set_submodule(PROJECTION[name], nn.Conv2d(3, old.out_channels, size, size))
    want = outcome(name, untouched, normalised(raw_images(), MEAN, STD))
    assert name != "timm-vit-dynamic-size" or not isinstance(want, str)
    for images in (raw_images(), normalised(raw_images(), MEAN, STD)):
        got = outcome(name, model, images)
        assert isinstance(got, str) == isinstance(want, str), (got, want)
        if not isinstance(want, str):
            expect_close(got, want)


class Stem(nn.Module):
    """Somebody's own patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.convolution, self.norm = nn.Conv2d(3, 48, 8, 8), nn.LayerNorm(48)

    def forward(self, images: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.norm(self.convolution(images).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("timm-vit", "patch_embed"),
        ("timm-beit", "patch_embed"),
        ("transformers-vit", "vit.embeddings.patch_embeddings"),
        ("transformers-vit-mae", "vit.embeddings.patch_embeddings"),
    ],
)
def test_replaced_patch_embedding(name: str, path: str):
    model, untouched = pair(name, mean=MEAN, std=STD)
    for side in (model, untouched):
        side.set_submodule(path, Stem())
    expect_the_library_s(name, model, untouched)


def test_replaced_encoder():
    model, untouched = pair("torchvision-vit", mean=MEAN, std=STD)
    for side in (model, untouched):
        torch.manual_seed(6)
        side.encoder = type(untouched.encoder)(17, 1, 3, 48, 96, 0.0, 0.0)
    expect_the_library_s("torchvision-vit", model, untouched)


def test_a_wrapper_that_holds_ours():
    """As FSDP and modules_to_save are: what is inside still is one call, what is around it is not."""

    class Wrapper(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inside"), name)

        def forward(self, *args: Any) -> Any:
            return self.inside(*args)

    model, untouched = pair("timm-vit", mean=MEAN, std=STD)
    for side in (model, untouched):
        side.patch_embed = Wrapper(side.patch_embed)
    expect_the_library_s("timm-vit", model, untouched, launches=1)


METHODS = {
    "timm-vit": ("", "_pos_embed"),
    "timm-vit-dynamic-size": ("patch_embed", "forward"),
    "torchvision-vit": ("", "_process_input"),
    "transformers-vit-mae": ("vit.embeddings", "random_masking"),
    "transformers-vit": ("vit.embeddings.patch_embeddings", "forward"),
}


@pytest.mark.parametrize("in_class", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_replaced_method(name: str, in_class: bool, monkeypatch: pytest.MonkeyPatch):
    """On the module, and in its class."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    path, method = METHODS[name]
    kind = type(untouched.get_submodule(path))
    own = getattr(kind, method)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    if in_class:
        monkeypatch.setattr(kind, method, changed)
    else:
        for side in (model, untouched):
            module = side.get_submodule(path)
            setattr(module, method, types.MethodType(changed, module))
    # A patch embedding is one call still where its class alone was changed, or another's method around it.
    launches = 0 if method == "forward" or "timm" not in name else 1
    expect_the_library_s(name, model, untouched, launches)


RESAMPLING = {
    "timm-vit-dynamic-size": "vision_transformer",
    "timm-eva-dynamic-size": "eva",
}


@pytest.mark.parametrize("name", RESAMPLING)
def test_replaced_resampling(name: str, monkeypatch: pytest.MonkeyPatch):
    """The function that the host's own code would find in its module."""
    model, untouched = pair(name)
    module: Any = import_peer(f"timm.models.{RESAMPLING[name]}")
    own = module.resample_abs_pos_embed
    images = normalised(raw_images(size=48), MEAN, STD)
    before = entry(name).outputs(untouched, images)
    expect_close(entry(name).outputs(model, images), before)
    monkeypatch.setattr(module, "resample_abs_pos_embed", lambda *args, **kwargs: 2 * own(*args, **kwargs))
    want = entry(name).outputs(untouched, images)
    assert not torch.allclose(want[0], before[0])
    launched()
    expect_close(entry(name).outputs(model, images), want)
    assert launched() == 1


def one_row(table: Tensor) -> Tensor:
    return table[:, 3:4]


def one_number(table: Tensor) -> Tensor:
    return table[0, 3, 5]


def a_table_a_sample(table: Tensor) -> Tensor:
    return torch.cat([table, 2 * table])


TABLES = {
    "timm-vit": "pos_embed",
    "timm-beit-positions": "pos_embed",
    "torchvision-vit": "encoder.pos_embedding",
    "transformers-vit": "vit.embeddings.position_embeddings",
}


@pytest.mark.parametrize("form", [one_row, one_number, a_table_a_sample])
@pytest.mark.parametrize("name", TABLES)
def test_positions_of_another_form(name: str, form: Callable[[Tensor], Tensor]):
    model, untouched = pair(name, mean=MEAN, std=STD)
    path, _, attribute = TABLES[name].rpartition(".")
    for side in (model, untouched):
        module = side.get_submodule(path)
        setattr(module, attribute, nn.Parameter(form(getattr(module, attribute).detach()).clone()))
    expect_the_library_s(name, model, untouched, launches=1 if name.startswith("timm") else 0)


TOKENS = {
    "timm-vit": "cls_token",
    "torchvision-vit": "class_token",
    "transformers-vit": "vit.embeddings.cls_token",
    "transformers-clip": "vision_model.embeddings.class_embedding",
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_class_token_a_sample(name: str):
    model, untouched = pair(name, mean=MEAN, std=STD)
    path, _, attribute = TOKENS[name].rpartition(".")
    for side in (model, untouched):
        module = side.get_submodule(path)
        token = getattr(module, attribute).detach().reshape(1, 1, -1)
        setattr(module, attribute, nn.Parameter(torch.cat([token, 2 * token])))
    expect_the_library_s(name, model, untouched, launches=1 if name.startswith("timm") else 0)


def test_a_token_that_the_host_does_not_read():
    model, untouched = pair("timm-vit-registers", mean=MEAN, std=STD)
    for side in (model, untouched):
        torch.manual_seed(6)
        side.dist_token = nn.Parameter(torch.randn(1, 1, 48))
    expect = entry("timm-vit-registers").outputs(untouched, normalised(raw_images(), MEAN, STD))
    expect_close(entry("timm-vit-registers").outputs(model, raw_images()), expect)


@pytest.mark.parametrize("name", ["transformers-clip", "transformers-siglip"])
def test_other_position_ids(name: str):
    """In another order they are looked up, by the host's module; a row for every sample is the host's alone."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    path = next(path for path, module in untouched.named_modules() if hasattr(module, "position_ids"))
    in_another_order = untouched.get_submodule(path).position_ids.flip(1)
    for ids, launches in ((in_another_order, 1), (torch.cat([in_another_order, in_another_order.flip(1)]), 0)):
        for side in (model, untouched):
            side.get_submodule(path).position_ids = ids
        expect_the_library_s(name, model, untouched, launches)


def replica(module: nn.Module) -> Any:
    """As DataParallel makes it: without parameters of its own."""
    copied = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is not None:
            setattr(copied, name, replica(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            setattr(copied, name, parameter.view_as(parameter))
    return copied


@pytest.mark.parametrize("name", PROJECTION)
def test_replicas(name: str):
    model, untouched = pair(name, mean=MEAN, std=STD)
    want = entry(name).outputs(untouched, normalised(raw_images(), MEAN, STD))
    assert not list(replica(model).parameters())
    launched()
    expect_close(entry(name).outputs(replica(model), raw_images()), want)
    assert launched() == 1
    adapted(model, PROJECTION[name])
    assert launched() == 0 and isinstance(outcome(name, replica(model), raw_images()), list)


class Towers(nn.Module):
    """Two that share their patch embedding and their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = build("timm-vit"), build("timm-vit")
        self.other.patch_embed, self.other.pos_embed = self.one.patch_embed, self.one.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        return self.one(images) + 2 * self.other(images)


def test_towers_that_share_a_patch_embedding():
    untouched = Towers()
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    want = untouched(normalised(raw_images(), MEAN, STD))
    launched()
    expect_close([model(raw_images())], [want])
    assert launched() == 2
    fastvit.restore(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_all_or_nothing(name: str, accelerated: bool, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(build(name))
    if accelerated:
        fastvit.accelerate(model, mean=MEAN, std=STD)
    before = [(type(module), dict(module.__dict__), dict(module._forward_pre_hooks)) for module in model.modules()]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "open_doors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastvit.accelerate(model, mean=STD, std=MEAN)
    after = [(type(module), dict(module.__dict__), dict(module._forward_pre_hooks)) for module in model.modules()]
    assert [one[0] for one in after] == [one[0] for one in before]
    assert [one[1].keys() for one in after] == [one[1].keys() for one in before]
    assert [one[2] for one in after] == [one[2] for one in before]
    settings = [one[1].get("fastvit_settings") for one in after]
    assert settings == [one[1].get("fastvit_settings") for one in before]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_bound_method_outlives_the_mixin(name: str):
    """As mixed precision is put around a model: the function of its bound forward is kept in the module."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    inner = model if name != "transformers-vit" else model.vit.embeddings
    function = inner.forward.__func__
    inner.forward = types.MethodType(lambda self, *args, **kwargs: function(self, *args, **kwargs), inner)
    want = entry(name).outputs(untouched, normalised(raw_images(), MEAN, STD))
    expect_close(entry(name).outputs(model, raw_images()), want)
    fastvit.restore(model)
    expect_close(entry(name).outputs(model, normalised(raw_images(), MEAN, STD)), want)


def test_a_method_of_the_class_replaced_before(monkeypatch: pytest.MonkeyPatch):
    model = build("timm-vit")
    own = type(model)._pos_embed
    monkeypatch.setattr(type(model), "_pos_embed", lambda self, x: 2 * own(self, x))
    untouched = copy.deepcopy(model)
    fastvit.accelerate(model, mean=MEAN, std=STD)
    assert [change.path for change in fastvit.report(model).changes] == ["patch_embed"]
    expect_the_library_s("timm-vit", model, untouched, launches=1)


def test_a_refusal_names_classes_apart():
    """A class that is called Conv2d too."""
    other = type("Conv2d", (nn.Conv2d,), {"__module__": "elsewhere"})
    model = build("timm-vit")
    model.patch_embed.proj.__class__ = other
    with pytest.raises(acceleration.Unsupported, match="is a elsewhere.Conv2d, not torch.nn.modules.conv.Conv2d"):
        fastvit.accelerate(model)
