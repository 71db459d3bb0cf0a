"""Blocks that keep how they are run, beside untouched ones: what the tests of this share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit import stream
from fastvit.interop.trunk import TrunkBlock
from fastvit.model.layers import Block
from tests.interop.subjects import expect_close, expect_same_gradients, gradients, launched
from tests.interop.test_trunk import dinov2, timm_vit, torchvision_vit
from tests.interop.zoo import randomise, tensors
from tests.libraries import skipped_without_library

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


@functools.cache
def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    randomise(model)
    return model


@pytest.fixture(params=MODELS)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A block that has run and keeps how, and an untouched one; both train."""
    monkeypatch.setattr(stream, "_pay", lambda x: pays[0])
    with skipped_without_library():
        untouched = copy.deepcopy(build(request.param))
    model = copy.deepcopy(untouched)
    if request.param != "own":
        model = fastvit.accelerate(model, backend="cpu")
    path = [path for path, module in model.named_modules() if isinstance(module, (TrunkBlock, Block))][-1]
    ours, theirs = model.get_submodule(path), untouched.get_submodule(path)
    vars(theirs)["is_untouched"] = True
    launched("add_norm")
    expect_the_same(ours, theirs)
    assert launched("add_norm") > 0 and vars(ours)["fastvit_kept"].halves is not None
    return ours, theirs


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


def replaced(block: Any, what: str, make: Callable[[Any], Any]) -> None:
    path, module = part(block, what)
    if module is not None:
        torch.manual_seed(4)
        block.set_submodule(path, make(module))
