"""What a block keeps from one call to the next holds only as long as nothing has changed, whatever it is."""

from __future__ import annotations

import copy
import functools
import gc
import io
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import guards, stream, tuning
from fastvit.backend import use_backend
from fastvit.interop.trunk import TrunkBlock
from fastvit.model.layers import Block
from tests.interop.subjects import expect_close, expect_same_gradients, gradients, launched
from tests.interop.test_changed_after import replica
from tests.interop.test_trunk import dinov2, timm_vit, torchvision_vit
from tests.interop.zoo import randomise, tensors

WIDTH, TOKENS, BF16 = 48, 17, torch.bfloat16
OURS = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": 5}
MODELS: dict[str, Callable[[], Any]] = {
    "timm": lambda: timm_vit(init_values=0.3, drop_path_rate=0.3),
    "timm, plain": timm_vit,
    "torchvision": torchvision_vit,
    "transformers": lambda: dinov2(drop_path_rate=0.3, layerscale_value=0.3),
    "own": lambda: fastvit.VisionTransformer(**OURS, init_values=0.3, drop_path_rate=0.3),
}
# The first of each that a block has.
PARTS = {
    "attention": ("attn", "self_attention", "attention"),
    "first": ("mlp.fc1", "mlp.0"),
    "act": ("mlp.act", "mlp.1", "mlp.activation"),
    "last": ("mlp.fc2", "mlp.3"),
    "norm": ("norm2", "ln_2"),
    "drop": ("mlp.drop2", "mlp.4"),
}
pays = [True]  # whether our own model's blocks run by the ops


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_pay", lambda x: pays[0])


@functools.cache
def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    randomise(model)
    return model


@pytest.fixture(params=MODELS)
def blocks(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A block that has run and keeps how, and an untouched one; both train."""
    try:
        untouched = copy.deepcopy(build(request.param))
    except ImportError as reason:
        pytest.skip(str(reason))
    model = copy.deepcopy(untouched)
    if request.param != "own":
        model = fastvit.accelerate(model, backend="cpu")
    path = [path for path, module in model.named_modules() if isinstance(module, (TrunkBlock, Block))][-1]
    ours, theirs = model.get_submodule(path), untouched.get_submodule(path)
    vars(theirs)["is_untouched"] = True
    launched("add_norm")
    expect_the_same(ours, theirs)
    assert launched("add_norm") > 0 and vars(ours)["fastvit_kept"].halves is not None
    yield ours, theirs


def part(block: Any, what: str) -> tuple[str, Any]:
    """Its path, and the module itself."""
    modules = dict(block.named_modules())
    return next(((path, modules[path]) for path in PARTS[what] if path in modules), ("", None))


def outcome(block: Any, x: Tensor, around: Any = nullcontext) -> Any:
    """Results, gradients of parameters and that of x; or the class of the error."""
    pays[0] = "is_untouched" not in vars(block)
    x = x.detach().requires_grad_(not x.is_inference())
    torch.manual_seed(1)
    try:
        with around():
            outputs = tensors([block(x)])
        trained = [output for output in outputs if output.requires_grad]
        found = gradients(block, [output.float() for output in trained]) if trained else {}
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return type(error)
    finally:
        pays[0] = True
    return outputs, found, x.grad


def expect_the_same(ours: Any, theirs: Any, x: Tensor | None = None, around: Any = nullcontext, times: int = 2) -> None:
    x = torch.randn(3, TOKENS, WIDTH) if x is None else x
    want = outcome(theirs, x, around)
    for _ in range(times):
        got = outcome(ours, x, around)
        if isinstance(want, type) or isinstance(got, type):
            assert isinstance(got, type) and isinstance(want, type), (got, want)
            continue
        assert (got[2] is None) == (want[2] is None) and got[1].keys() == want[1].keys()
        dtypes = {tensor.dtype for tensor in (*got[0], *got[1].values())}
        if dtypes == {torch.float32} and not torch.is_autocast_enabled("cpu") and around is nullcontext:
            expect_close(got[0], want[0])
            if any(bool(grad.any()) for grad in want[1].values()):
                expect_same_gradients(got[1], want[1])
            if want[2] is not None:
                expect_close([got[2]], [want[2]], 1e-4)
        else:
            expect_close([t.float() for t in got[0]], [t.float() for t in want[0]], 2e-2)
            assert [t.dtype for t in got[0]] == [t.dtype for t in want[0]]
            assert all(got[1][name].dtype == grad.dtype for name, grad in want[1].items())
            whole = sum(float(grad.float().norm()) ** 2 for grad in want[1].values()) ** 0.5
            assert all(float((got[1][n].float() - g.float()).norm()) <= 3e-2 * whole for n, g in want[1].items())


HOOKS: dict[str, Callable[[Any, Callable[..., Any]], Any]] = {
    "before": lambda module, hook: module.register_forward_pre_hook(lambda _, inputs: hook(inputs)),
    "behind": lambda module, hook: module.register_forward_hook(lambda _, inputs, output: hook(output)),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda _, inputs, grads: hook(None)),
    "before backward": lambda module, hook: module.register_full_backward_pre_hook(lambda _, grads: hook(None)),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_every_module(blocks: Any, kind: str) -> None:
    """Which change what they are given, and are taken away again."""
    for path, _ in [*blocks[1].named_modules()]:
        heard: tuple[list[int], list[int]] = ([], [])
        handles = []
        for block, list_ in zip(blocks, heard, strict=True):

            def hook(given: Any, list_: list[int] = list_) -> Any:
                list_.append(1)
                is_one = isinstance(given, Tensor)
                values = [given] if is_one else list(given or ())
                values = [1.25 * v if isinstance(v, Tensor) else v for v in values]
                return (values[0] if is_one else tuple(values)) if values else None

            handles.append(HOOKS[kind](block.get_submodule(path), hook))
        expect_the_same(*blocks, times=1)
        assert len(heard[0]) == len(heard[1]), path
        for handle in handles:
            handle.remove()
    expect_the_same(*blocks)


def test_a_new_dictionary_of_hooks(blocks: Any) -> None:
    for path, _ in [*blocks[1].named_modules()][1:]:
        heard: tuple[list[int], list[int]] = ([], [])
        for block in blocks:
            block.get_submodule(path)._forward_hooks = OrderedDict()
        expect_the_same(*blocks, times=1)
        for block, list_ in zip(blocks, heard, strict=True):
            block.get_submodule(path)._forward_hooks[7] = lambda *_, list_=list_: list_.append(1)
        expect_the_same(*blocks, times=1)
        assert len(heard[0]) == len(heard[1]), path


class Adapter(nn.Linear):
    """As LoRA's layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


class Doubled(nn.Parameter):
    """A parameter of a class of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(Tensor) if func is F.linear else result


def replaced(block: Any, what: str, make: Callable[[Any], Any]) -> None:
    path, module = part(block, what)
    if module is not None:
        torch.manual_seed(4)
        block.set_submodule(path, make(module))


def on(what: str, do: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        _, module = part(block, what)
        if module is not None:
            torch.manual_seed(4)
            do(module)

    return change


def to_buffer(linear: Any) -> None:
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)


def another_class(module: Any, kind: type) -> None:
    module.__class__ = kind


def swapped(linear: Any) -> None:
    other = nn.Parameter(linear.weight.detach().clone())
    another_class(other, Doubled)
    torch.utils.swap_tensors(linear.weight, other)


def dropped(block: Any, p: float) -> None:
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def rate(block: Any) -> None:
    for module in block.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.6


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        found = forward(*args, **options)
        return 2 * found if isinstance(found, Tensor) else (2 * found[0], *found[1:])

    return call


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "forward": on("attention", lambda m: setattr(m, "forward", doubled(m.forward))),
    "forward of the MLP's last": on("last", lambda m: setattr(m, "forward", lambda x: F.linear(x, m.weight))),
    "parameter": on("first", lambda m: setattr(m, "weight", nn.Parameter(torch.randn_like(m.weight)))),
    "norm's parameter": on("norm", lambda m: setattr(m, "weight", nn.Parameter(torch.randn_like(m.weight)))),
    "no bias": on("first", lambda m: setattr(m, "bias", None)),
    "no last bias": on("last", lambda m: setattr(m, "bias", None)),
    "data": on("first", lambda m: setattr(m.weight, "data", torch.randn_like(m.weight))),
    "dtype of data": on("first", lambda m: setattr(m.weight, "data", m.weight.data.bfloat16())),
    "shapes of data": on("first", lambda m: setattr(m.weight, "data", m.weight.data[:-1])),
    "in place": on("last", lambda m: m.weight.data.mul_(1.5)),
    "half": lambda block: block.half(),
    "bfloat16": lambda block: block.bfloat16(),
    "double": lambda block: block.double(),
    "all frozen": lambda block: block.requires_grad_(False),
    "one frozen": on("first", lambda m: m.weight.requires_grad_(False)),
    "biases frozen": lambda block: [p.requires_grad_(p.dim() > 1) for p in block.parameters()],
    "act": lambda block: replaced(block, "act", lambda _: nn.SiLU()),
    "act of no known kind": lambda block: replaced(block, "act", lambda _: nn.Mish()),
    "act's approximation": on("act", lambda m: setattr(m, "approximate", "tanh")),
    "norm": lambda block: replaced(block, "norm", lambda _: nn.GroupNorm(1, TOKENS)),
    "class of the norm": lambda block: replaced(block, "norm", lambda _: nn.RMSNorm(WIDTH, eps=0.1)),
    "adapter": lambda block: replaced(block, "last", lambda m: Adapter(m.in_features, WIDTH)),
    "class of a layer": on("first", lambda m: another_class(m, Adapter)),
    "more dropout": lambda block: replaced(block, "drop", lambda _: nn.Dropout(0.5)),
    "no dropout": lambda block: replaced(block, "drop", lambda _: nn.Identity()),
    "dropouts": lambda block: dropped(block, 0.4),
    "eps": on("norm", lambda m: setattr(m, "eps", 0.5)),
    "heads": on("attention", lambda m: [setattr(m, "num_heads", 4), setattr(m, "head_dim", 12)]),
    "attention by hand": on("attention", lambda m: setattr(m, "fused_attn", False)),
    "eval": lambda block: block.eval(),
    "one part in eval": on("attention", lambda m: m.eval()),
    "drop path": rate,
    "parametrization": on("first", lambda m: parametrize.register_parametrization(m, "weight", Halved())),
    "weight norm": on("last", lambda m: parametrizations.weight_norm(m)),
    "old weight norm": on("last", lambda m: nn.utils.weight_norm(m)),
    "pruning": on("first", lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "swapped for another class": on("last", swapped),
    "buffer": on("last", to_buffer),
    "scripted": lambda block: replaced(block, "act", lambda m: torch.jit.script(m)),
    # In training its random numbers are other ones from the second call on.
    "scripted MLP": lambda block: setattr(block.eval(), "mlp", torch.jit.script(block.mlp)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change(blocks: Any, change: str) -> None:
    for block in blocks:
        try:
            CHANGES[change](block)
        except RuntimeError as error:
            pytest.skip(f"torch can't: {error}")
    x = torch.randn(3, TOKENS, WIDTH, dtype=next(iter(blocks[1].parameters())).dtype)
    for inputs in (x, x.float()) if x.dtype != torch.float32 else (x,):
        expect_the_same(*blocks, inputs)


def test_a_forward_in_its_class(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("act", "first", "norm", "attention"):
        _, module = part(blocks[0], what)
        if module is not None:
            own = type(module).forward
            with monkeypatch.context() as patched:
                patched.setattr(type(module), "forward", lambda *args, own=own, **options: own(*args, **options))
                expect_the_same(*blocks)
        expect_the_same(*blocks)


def test_back_again(blocks: Any) -> None:
    """Dtypes, modes, backends, precision and torch's choices of attention, in turn."""
    ours, theirs = blocks
    x, mask = torch.randn(3, TOKENS, WIDTH), torch.autocast("cpu", BF16)
    arounds = (torch.no_grad, lambda: torch.autocast("cpu", BF16), lambda: torch.autocast("cpu", torch.float16),
               lambda: use_backend("reference"), lambda: use_backend("cpu"), lambda: sdpa_kernel(SDPBackend.MATH),
               torch.inference_mode, lambda: FlopCounterMode(display=False),
               torch.profiler.profile, lambda: torch.device("cpu"))  # fmt: skip
    for around in arounds:
        expect_the_same(ours, theirs, x, around)
        expect_the_same(ours, theirs, x)
    with mask:
        expect_the_same(ours, theirs, x.to(BF16))
    for dtype in (torch.double, BF16):
        for block in blocks:
            block.to(dtype)
        expect_the_same(ours, theirs, x.to(dtype))
        for block in blocks:
            block.float()
        expect_the_same(ours, theirs, x)
    tuning.reset()
    expect_the_same(ours, theirs, x)
    for module in (*blocks, *blocks):
        module.train(not module.training)
        expect_the_same(module, module, x, times=1)


def test_shapes_and_dtypes_from_call_to_call(blocks: Any) -> None:
    """More of them than are kept."""
    for count in range(1, stream.MOST_READY + 3):
        outcome(blocks[0], torch.randn(1, count, WIDTH), torch.no_grad)
    for shape in ((2, 5), (1, 1), (3, 700), (0, 5), (3, TOKENS)):
        expect_the_same(*blocks, torch.randn(*shape, WIDTH))
    expect_the_same(*blocks, torch.randn(3, TOKENS, WIDTH, dtype=BF16))
    expect_the_same(*blocks, torch.randn(WIDTH, TOKENS, 3).permute(2, 1, 0))
    expect_the_same(*blocks, torch.randn(3, TOKENS, WIDTH + 1))


def test_copies_replicas_and_pickles(blocks: Any) -> None:
    """None goes by what another block keeps."""
    ours, theirs = blocks
    with torch.no_grad():
        expect_close(outcome(replica(ours), x := torch.ones(2, TOKENS, WIDTH))[0], outcome(theirs, x)[0])
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    shallow = copy.copy(ours)  # which has the same parts
    for other in (copy.deepcopy(ours), torch.load(saved, weights_only=False), shallow, ours):
        expect_the_same(other, theirs)
        assert other.fastvit_kept.block() is other
        own = copy.deepcopy(theirs)
        for block in (other, own):
            replaced(block, "norm", lambda _: nn.LayerNorm(WIDTH, eps=0.3))
        expect_the_same(other, own)
        if other is shallow:
            theirs = own


def test_other_parameters_for_a_call(blocks: Any) -> None:
    x, found = torch.randn(3, TOKENS, WIDTH), []
    for block in blocks:
        pays[0] = block is blocks[0]
        others = {name: 1.5 * parameter for name, parameter in block.named_parameters()}
        torch.manual_seed(1)
        result = tensors([torch.func.functional_call(block, others, (x,))])[0]
        found.append([result, *torch.autograd.grad(result.square().sum(), list(block.parameters()))])
    expect_close(found[0][:1], found[1][:1])
    names = [name for name, _ in blocks[0].named_parameters()]
    expect_same_gradients(*(dict(zip(names, grads[1:], strict=True)) for grads in found))
    expect_the_same(*blocks)


def test_without_values_and_watched(blocks: Any) -> None:
    ours, theirs = blocks
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert tensors([ours(torch.randn(3, TOKENS, WIDTH))])[0].shape == (3, TOKENS, WIDTH)
    expect_the_same(ours, theirs)
    heard: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    outcome(ours, torch.randn(3, TOKENS, WIDTH))
    handle.remove()
    assert part(ours, "norm")[1] in heard
    expect_the_same(ours, theirs)
    ours.to("meta"), theirs.to("meta")
    assert tensors([ours(torch.randn(3, TOKENS, WIDTH, device="meta"))])[0].is_meta


def test_threads(blocks: Any) -> None:
    """In several at once, each with its own precision, mode and number of tokens."""
    ours, theirs = (block.eval() for block in blocks)
    x = {tokens: torch.randn(2, tokens, WIDTH) for tokens in (5, TOKENS)}
    want = {}
    for tokens, autocast in [(t, a) for t in x for a in (False, True)]:
        around = (lambda: torch.autocast("cpu", BF16)) if autocast else nullcontext
        want[tokens, autocast] = outcome(ours, x[tokens], around)[0][0].detach()
    wrong: list[Any] = []

    def work(tokens: int, autocast: bool) -> None:
        for turn in range(15):
            with torch.set_grad_enabled(turn % 2 == 0), torch.autocast("cpu", BF16, enabled=autocast):
                result = tensors([ours(x[tokens])])[0]
            if not torch.equal(result, want[tokens, autocast]):
                wrong.append((tokens, autocast))

    threads = [threading.Thread(target=work, args=key) for key in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    expect_the_same(ours, theirs)


def test_nothing_stays_behind(blocks: Any) -> None:
    """Not in a block that is restored, and none in memory for what it keeps."""
    ours, theirs = blocks
    if isinstance(ours, TrunkBlock):
        restored = fastvit.restore(nn.Sequential(copy.deepcopy(ours)))[0]
        assert vars(restored).keys() == vars(theirs).keys() - {"is_untouched"} and type(restored) is type(theirs)
    other = copy.deepcopy(ours)
    expect_the_same(other, theirs)
    is_alive = weakref.ref(next(iter(other.parameters())))
    gc.collect()
    gc.disable()
    try:
        del other
        assert is_alive() is None
    finally:
        gc.enable()


def test_a_snapshot_of_a_buffer_and_of_attributes() -> None:
    """Each fact alone: what is changed is seen, and seen as it was again when it is put back."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.LayerNorm(4))
    module.register_buffer("table", torch.zeros(3))
    shot = guards.Snapshot(module)
    assert shot.holds(module)
    facts: list[tuple[Any, str, Any]] = [
        (module, "training", False), (module[2], "eps", 0.1), (module[0], "in_features", 5), (module[1], "more", 1),
        (module[0], "__class__", Adapter), (module, "table", torch.ones(3)),
        (module[0].weight, "data", torch.zeros(4, 5)),
        (module[0].weight, "data", torch.zeros(4, 4).half()), (module[0], "bias", None), (module[1], "forward", print),
    ]  # fmt: skip
    for owner, name, value in facts:
        is_new = not hasattr(owner, name) or (name == "forward")
        before = None if is_new else getattr(owner, name)
        setattr(owner, name, value)
        assert not shot.holds(module), (owner, name)
        delattr(owner, name) if is_new else setattr(owner, name, before)
        assert shot.holds(module), (owner, name)
    module[0].extra = torch.zeros(2)
    assert not guards.Snapshot(module).holds(module), "whose values can't be compared"
