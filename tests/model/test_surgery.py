"""What people put on a timm model counts on ours as it does on timm's: hooks, adapters, pruning, replaced parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import fastvit
from fastvit import guards, stream
from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.model.layers import Block

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = (2, 3, 24, 32)
WIDTH, GRID = 48, (3, 4)


@pytest.fixture(autouse=True)
def _nothing_was_told_yet(monkeypatch):
    monkeypatch.setattr(guards, "_warned", set())


@pytest.fixture
def pair(pair_with_timm) -> Callable[..., tuple[fastvit.VisionTransformer, nn.Module]]:
    """Ours, which normalises raw pixels, and timm's, with the same weights."""

    def build(**arguments: Any) -> tuple[fastvit.VisionTransformer, nn.Module]:
        ours, theirs = pair_with_timm(depth=1, **arguments)
        options = {"img_size": (24, 32), "patch_size": 8, "embed_dim": WIDTH, "num_heads": 3, "num_classes": 7}
        raw = fastvit.VisionTransformer(**{**options, "depth": 1, **arguments}, mean=MEAN, std=STD)
        raw.load_state_dict(ours.state_dict())
        return raw, theirs

    return build


def raw_images(size: tuple[int, ...] = IMAGES) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8)


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def run(model: nn.Module, images: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """Output and every gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(images)
    output.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **found}


def expect_the_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = value.abs().max() + 1e-6
        torch.testing.assert_close(ours[name] / scale, value / scale, rtol=1e-4, atol=1e-4, msg=name)


# ---- what people do --------------------------------------------------------------------------------------------------


def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Adapter(nn.Module):
    """As LoRA wraps a layer: no attribute of the convolution's but the weight."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Conv2d(3, 2, 8, 8, bias=False)
        self.up = nn.Conv2d(2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.low(x))


class Wrapper(nn.Module):
    """As peft's modules_to_save and FSDP wrap a part: whatever it lacks is looked up inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class Halves(Tensor):
    """A tensor of a class of its own, as quantised weights are: it stands for twice its values."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.conv2d or function is nn.functional.conv2d:
            args = [arg.as_subclass(Tensor) * 2 if isinstance(arg, Halves) else arg for arg in args]
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class Noise(nn.Module):
    """In place of a dropout: other noise for each place."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 2, x.shape[1]).view(-1, *[1] * (x.dim() - 2))


def projection(change: Callable[[nn.Conv2d], Any]) -> Callable[[Any], Any]:
    def apply(model: Any) -> None:
        change(model.patch_embed.proj)

    return apply


def new_projection(build: Callable[[nn.Conv2d], nn.Module], **attributes: Any) -> Callable[[Any], Any]:
    def apply(model: Any) -> None:
        old = model.patch_embed.proj
        model.patch_embed.proj = build(old)
        for name, value in attributes.items():
            setattr(model.patch_embed, name, value)

    return apply


def subclass(old: nn.Conv2d) -> nn.Module:
    new = Twice(3, WIDTH, 8, 8)
    new.load_state_dict(old.state_dict())
    return new


def other_forward(proj: nn.Conv2d) -> None:
    plain = proj.forward
    proj.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]


def half_stride(model: Any) -> None:
    model.patch_embed.proj.stride = (4, 4)
    model.pos_embed = nn.Parameter(torch.randn(1, 5 * 7 + 1, WIDTH))


def dilated(proj: nn.Conv2d) -> None:
    proj.dilation, proj.padding = (2, 2), (4, 4)


def scaled_table(model: Any) -> None:
    class Twofold(nn.Module):
        def forward(self, table: Tensor) -> Tensor:
            return table * 2

    parametrize.register_parametrization(model, "pos_embed", Twofold())


def quantised(proj: nn.Conv2d) -> None:
    data = (proj.weight.detach() / 2).as_subclass(Halves)
    proj.weight = nn.Parameter(data, requires_grad=False)


def timm_embedding(model: Any) -> None:
    from timm.layers import PatchEmbed

    new = PatchEmbed((24, 32), 8, 3, WIDTH)
    new.load_state_dict(model.patch_embed.state_dict())
    model.patch_embed = new


def hook(name: str, is_pre: bool = False) -> Callable[[Any], Any]:
    def apply(model: Any) -> None:
        module = model.get_submodule(name)
        if is_pre:
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        else:
            module.register_forward_hook(double)

    return apply


def put(name: str, build: Callable[[], Any]) -> Callable[[Any], Any]:
    def apply(model: Any) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, build())

    return apply


def wrap(name: str) -> Callable[[Any], Any]:
    def apply(model: Any) -> None:
        setattr(model, name, Wrapper(getattr(model, name)))

    return apply


def random_table(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*shape))


# What is done, and what the warning about it says ("": the call stays one).
SURGERY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "nothing": (lambda model: None, ""),
    "hook_projection": (hook("patch_embed.proj"), "patch_embed.proj has hooks"),
    "pre_hook_projection": (hook("patch_embed.proj", is_pre=True), "patch_embed.proj has hooks"),
    "hook_embedding": (hook("patch_embed"), "patch_embed has hooks"),
    "pre_hook_embedding": (hook("patch_embed", is_pre=True), "patch_embed has hooks"),
    "hook_identity_norm": (hook("patch_embed.norm"), "patch_embed.norm has hooks"),
    "hook_norm_pre": (hook("norm_pre"), ""),
    "hook_pos_drop": (hook("pos_drop"), ""),
    "hook_patch_drop": (hook("patch_drop"), ""),
    "hook_fc_norm": (hook("fc_norm"), ""),
    "forward_replaced": (projection(other_forward), "patch_embed.proj has a forward that was replaced"),
    "subclass": (new_projection(subclass), "Twice, not torch.nn.modules.conv.Conv2d itself"),
    "adapter": (new_projection(Adapter), "Adapter, not"),
    "pruned": (projection(lambda proj: prune.random_unstructured(proj, "weight", 0.5)), "patch_embed.proj has hooks"),
    "weight_norm": (projection(parametrizations.weight_norm), "ParametrizedConv2d"),
    "old_weight_norm": (projection(weight_norm), "patch_embed.proj has hooks"),
    "spectral_norm": (projection(parametrizations.spectral_norm), "ParametrizedConv2d"),
    "quantised": (projection(quantised), "Halves, not a plain tensor"),
    "half_stride": (half_stride, "patches overlap"),
    "overlapping": (new_projection(lambda old: nn.Conv2d(3, WIDTH, 12, 8, padding=2)), "patches overlap"),
    "dilated": (projection(dilated), "padding"),
    "other_kernel": (new_projection(lambda old: nn.Conv2d(3, WIDTH, (6, 8), (6, 8), padding=(0, 0))), "patch_size"),
    "embedding_of_timm": (timm_embedding, "timm.layers.patch_embed.PatchEmbed"),
    "embedding_wrapped": (wrap("patch_embed"), "Wrapper, not"),
    "norm_put_in": (put("patch_embed.norm", lambda: nn.LayerNorm(WIDTH)), ""),
    "norm_across": (put("patch_embed.norm", Noise), "which may look across patches"),
    "pos_drop_on": (put("pos_drop", lambda: nn.Dropout(0.5)), ""),
    "pos_drop_put_in": (put("pos_drop", Noise), ""),
    "patch_drop_put_in": (put("patch_drop", Noise), ""),
    "norm_pre_put_in": (put("norm_pre", lambda: nn.LayerNorm(WIDTH)), ""),
    "one_position": (put("pos_embed", random_table(1, 1, WIDTH)), "pos_embed has shape [1, 1, 48]"),
    "flat_table": (put("pos_embed", random_table(13, WIDTH)), "pos_embed has shape [13, 48]"),
    "table_a_sample": (put("pos_embed", random_table(2, 13, WIDTH)), "pos_embed has shape [2, 13, 48]"),
    "class_token_a_sample": (put("cls_token", random_table(2, 1, WIDTH)), "cls_token has shape [2, 1, 48]"),
    "parametrised_table": (scaled_table, ""),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("name", SURGERY)
def test_surgery_counts_as_on_timm(name, pair):
    change, reason = SURGERY[name]
    if name == "other_kernel":
        ours, theirs = pair(img_size=(24, 24), dynamic_img_size=True)
        images = raw_images((2, 3, 24, 24))
    else:
        ours, theirs = pair()
        images = raw_images()
    for model in (ours, theirs):
        torch.manual_seed(1)
        change(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for pixels in (images, normalise(images)):
            expect_the_same(run(ours, pixels), run(theirs, normalise(images)))
    told = [str(warning.message) for warning in told if "fastvit" in str(warning.message)]
    assert [reason in message for message in told] == ([True] if reason else []), told


@pytest.mark.parametrize("arguments", [{"dynamic_img_size": True, "dynamic_img_pad": True}, {"patch_drop_rate": 0.5}])
@pytest.mark.parametrize(
    "name", ["hook_projection", "hook_embedding", "hook_patch_drop", "embedding_wrapped", "norm_across"]
)
def test_surgery_with_other_arguments(arguments, name, pair):
    ours, theirs = pair(**arguments)
    images = raw_images((2, 3, 21, 43) if "dynamic_img_size" in arguments else IMAGES)
    for model in (ours, theirs):
        SURGERY[name][0](model)
    expect_the_same(run(ours, images), run(theirs, normalise(images)))


NAMES = ("patch_embed", "patch_embed.proj", "patch_embed.norm", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm")


@pytest.mark.parametrize("arguments", [{}, {"patch_drop_rate": 0.5, "pos_drop_rate": 0.1, "pre_norm": True}])
@pytest.mark.parametrize("name", [*NAMES, "blocks.0.ls1", "blocks.0.drop_path1", "fc_norm", "head_drop", "head", ""])
def test_hooks_are_heard_as_often_as_on_timm(name, arguments, pair):
    heard: list[list[tuple[str, Any]]] = []
    for model, images in zip(pair(**arguments), (raw_images(), torch.randn(IMAGES)), strict=True):
        module, seen = model.get_submodule(name), []
        heard.append(seen)
        # What comes in is compared too, but for the images of a model, which may be raw.
        of = (lambda inputs: None) if name == "" else (lambda inputs: (inputs[0].dtype, tuple(inputs[0].shape)))
        module.register_forward_pre_hook(lambda module, inputs, seen=seen, of=of: seen.append(("pre", of(inputs))))
        module.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(("post", tuple(out.shape))))
        module.register_full_backward_pre_hook(lambda module, grad, seen=seen: seen.append(("back pre", len(grad))))
        module.register_full_backward_hook(lambda module, gi, go, seen=seen: seen.append(("back", tuple(go[0].shape))))
        run(model, images)
    assert heard[0] == heard[1]
    assert len(heard[0]) == 4


def test_a_hook_on_every_module_hears_as_many_calls(pair):
    counts = []
    for model, images in zip(pair(), (raw_images(), torch.randn(IMAGES)), strict=True):
        names = {module: name for name, module in model.named_modules()}
        seen: list[str] = []
        register = nn.modules.module.register_module_forward_pre_hook
        handle = register(lambda module, inputs, names=names, seen=seen: seen.append(names[module]))
        try:
            run(model, images)
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("name", ["pruned", "old_weight_norm", "spectral_norm"])
def test_steps_of_an_optimizer(name, pair):
    ours, theirs = pair()
    images = raw_images()
    for model, pixels in ((ours, images), (theirs, normalise(images))):
        torch.manual_seed(1)
        SURGERY[name][0](model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            run(model, pixels)
            optimizer.step()
    expect_the_same(run(ours, images), run(theirs, normalise(images)))


def test_hooks_that_are_removed_leave_one_call(pair):
    ours, _ = pair()
    handle = ours.patch_embed.proj.register_forward_hook(double)
    ours(raw_images())
    handle.remove()
    reset_launch_counts()
    ours(raw_images())
    assert sum(count for (op, _), count in launch_counts().items() if op == "patch_embed") == 1


@pytest.mark.parametrize("arguments", [{}, {"residual_dtype": torch.bfloat16, "reg_tokens": 1}])
def test_a_replica_of_data_parallel(arguments, tiny):
    """Its parameters are plain tensors on the modules, and `parameters()` is empty."""
    model = tiny(mean=MEAN, std=STD, **arguments)
    replica = replicated(model)
    assert not list(replica.parameters())
    images = raw_images()
    reset_launch_counts()
    before = model(images)
    assert torch.equal(replica(images), before)
    assert sum(count for (op, _), count in launch_counts().items() if op == "patch_embed") == 2
    run(model, images)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    replica(images).square().mean().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    replica.patch_embed.proj.register_forward_hook(double)
    assert not torch.equal(replica(images), before)


def replicated(module: nn.Module) -> Any:
    """As torch.nn.parallel.replicate leaves each module, on the CPU."""
    replica: Any = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, parameter in module._parameters.items():
        value = None if parameter is None else parameter.clone()
        setattr(replica, name, value)
        replica._former_parameters[name] = value
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicated(child)
    return replica


def test_what_is_told_of_the_sizes_is_the_live_module(pair_with_timm):
    """A weight for one channel in a convolution made for three; a table, and a size, of another grid."""
    ours, theirs = pair_with_timm()
    for model in (ours, theirs):
        torch.manual_seed(1)
        weight = model.patch_embed.proj.weight.detach()
        model.patch_embed.proj.weight = nn.Parameter(weight.sum(1, keepdim=True))
        model.patch_embed.img_size = (40, 16)
        model.pos_embed = nn.Parameter(torch.randn(1, 5 * 2 + 1, WIDTH))
    images = torch.randn(2, 1, 40, 16)
    expect_the_same(run(ours, images), run(theirs, images))
    ours, theirs = pair_with_timm()
    ours.patch_embed.strict_img_size = theirs.patch_embed.strict_img_size = False
    images = torch.randn(2, 3, 48, 16)  # as many patches
    expect_the_same(run(ours, images), run(theirs, images))


@pytest.mark.parametrize("name", ["hook_projection", "adapter", "weight_norm", "embedding_wrapped", "flat_table"])
def test_compiles_to_one_graph_after_surgery(name, tiny):
    torch._dynamo.reset()
    model = tiny(mean=MEAN, std=STD, depth=1)
    SURGERY[name][0](model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        images = raw_images((batch, 3, 24, 32))
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16])
def test_dtypes_after_surgery_are_those_before(autocast, residual_dtype, tiny, device):
    model = tiny(mean=MEAN, std=STD, residual_dtype=residual_dtype, pre_norm=True)
    seen: list[torch.dtype] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    images = raw_images()
    outputs = []
    for _ in range(2):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            outputs.append(model(images))
        model.patch_embed.proj.register_forward_hook(lambda module, inputs, output: None)
    assert seen[0] == seen[1]
    torch.testing.assert_close(outputs[0].float(), outputs[1].float(), rtol=0.05, atol=0.05)
    half = tiny(mean=MEAN, std=STD).bfloat16()
    half.patch_embed.proj = Adapter(half.patch_embed.proj).bfloat16()
    assert half(images).dtype == half(torch.randn(IMAGES)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "images", "parts"),
    [
        (put("pos_embed", random_table(1, 9, WIDTH)), raw_images(), ("pos_embed", "[1, 9, 48]", "13")),
        (put("pos_embed", lambda: nn.Embedding(13, WIDTH)), raw_images(), ("pos_embed", "torch.Tensor", "Embedding")),
        (hook("patch_embed.proj"), raw_images((2, 3, 32, 32)), ("32 x 32", "24 x 32")),
        (hook("patch_embed.proj"), raw_images((2, 1, 24, 32)), ("1 channels", "3")),
        (wrap("patch_embed"), raw_images((2, 4, 24, 32)), ("4 channels", "3")),
        (half_stride, raw_images(), ()),
    ],
)
def test_what_can_not_be_is_an_error_in_words(change, images, parts, tiny):
    model = tiny(mean=MEAN, std=STD)
    if change.__qualname__.startswith("put"):
        del model.pos_embed  # a module may stand in its place
    change(model)
    with pytest.raises((ValueError, TypeError)) as raised:
        model.forward_intermediates(images) if change is half_stride else model(images)
    for part in parts:
        assert part in str(raised.value)


def test_an_embedding_of_ones_own_takes_timms_arguments(timm):
    from timm.layers import PatchEmbed

    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    for more in ({}, {"dynamic_img_size": True}, {"embed_norm_layer": nn.LayerNorm}):
        ours = fastvit.VisionTransformer(**options, **more, embed_layer=PatchEmbed, mean=MEAN, std=STD)
        plain = fastvit.VisionTransformer(**options, **more, mean=MEAN, std=STD)
        plain.load_state_dict(ours.state_dict())
        assert type(ours.patch_embed) is PatchEmbed
        images = raw_images((2, 3, 16, 16))
        expect_the_same(run(ours, images), run(plain, images))
        expect_the_same(run(ours, normalise(images)), run(plain, images))


def test_a_subclass_with_positions_of_its_own(tiny, monkeypatch):
    class Without(fastvit.VisionTransformer):
        def _pos_embed(self, x: Tensor) -> Tensor:
            return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    model, plain = (
        build(img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3, pos_embed=kind)
        for build, kind in ((Without, "learn"), (fastvit.VisionTransformer, "none"))
    )
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "pos_embed"})
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)


class Halved(Block):
    """A block that somebody has written over ours."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options) / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_with_a_forward_of_its_own_runs_it(monkeypatch: pytest.MonkeyPatch, checkpointing: bool) -> None:
    """Also among blocks that run by the trunk's ops, which are not called as modules."""
    torch.manual_seed(0)
    options = {"img_size": (24, 32), "patch_size": 8, "embed_dim": WIDTH, "num_heads": 3, "depth": 2}
    model = fastvit.VisionTransformer(**options).eval()
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(IMAGES)
    model.blocks[0].__class__ = Halved
    found = []
    for least in (2**40, 0):
        monkeypatch.setattr(stream, "LEAST_ON_A_CPU", least)
        found.append(model(images))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    model.blocks[0].__class__ = Block
    assert not torch.allclose(found[0], model(images), atol=1e-3)
