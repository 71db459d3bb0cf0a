"""What a block keeps from one call to the next holds only as long as nothing has changed, whatever it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastvit import guards
from tests.interop.kept import TOKENS, WIDTH, blocks, expect_the_same, part, replaced

__all__ = ["blocks"]  # a fixture


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
    """Which counts for every module of the class, and no longer when it is put back."""
    for what in ("act", "first", "norm", "attention", "drop"):
        _, module = part(blocks[1], what)
        if module is not None:
            with monkeypatch.context() as patched:
                patched.setattr(type(module), "forward", doubled(type(module).forward))
                expect_the_same(*blocks)
            expect_the_same(*blocks)


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
