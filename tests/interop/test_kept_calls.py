"""Calls of one block that differ in what they are given and in what surrounds them, one after another."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import stream, tuning
from fastvit.backend import use_backend
from fastvit.interop.trunk import TrunkBlock
from tests.interop.kept import BF16, TOKENS, WIDTH, blocks, expect_the_same, outcome, part, pays, replaced
from tests.interop.subjects import expect_close, expect_same_gradients
from tests.interop.test_changed_after import replica
from tests.interop.test_kept import doubled
from tests.interop.zoo import tensors

__all__ = ["blocks"]  # a fixture


@contextmanager
def another_attention() -> Iterator[None]:
    """In the place of torch's, as libraries of faster ones put theirs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", doubled(F.scaled_dot_product_attention))
        yield


def test_back_again(blocks: Any) -> None:
    """Dtypes, modes, backends, precision and torch's choices of attention, in turn."""
    ours, theirs = blocks
    x = torch.randn(3, TOKENS, WIDTH)
    arounds = (torch.no_grad, lambda: torch.autocast("cpu", BF16), lambda: torch.autocast("cpu", torch.float16),
               lambda: use_backend("reference"), lambda: use_backend("cpu"), lambda: sdpa_kernel(SDPBackend.MATH),
               torch.inference_mode, lambda: FlopCounterMode(display=False), torch.profiler.profile,
               lambda: torch.device("cpu"), another_attention)  # fmt: skip
    for around in arounds:
        expect_the_same(ours, theirs, x, around)
        expect_the_same(ours, theirs, x)
    with torch.autocast("cpu", BF16):
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
    for is_training in (False, True):
        for block in blocks:
            block.train(is_training)
        expect_the_same(ours, theirs, x)


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
