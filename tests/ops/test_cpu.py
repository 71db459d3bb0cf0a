"""What only the CPU backend has: two libraries for products, a choice of their dtype, and a batch in chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvit import functional
from fastvit.backend import triton_is_interpreted
from fastvit.cpu import gemm, patch_embed
from fastvit.cpu.linear import linear
from fastvit.validation.cases import cases_for
from fastvit.validation.runner import backend_candidate, check_case
from fastvit.validation.tolerance import relative_error

pytestmark = pytest.mark.skipif(triton_is_interpreted(), reason="the CPU backend has a run of its own")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_both_libraries_make_the_same_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, start: bool, threads: int
) -> None:
    left, right = torch.randn(70, 33, dtype=dtype), torch.randn(33, 21, dtype=dtype).t()
    first = torch.randn(70, 21, dtype=dtype) if start else None
    expected = left.double() @ right.double().t() + (first.double() if first is not None else 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for onednn in (True, False):
            monkeypatch.setattr(gemm, "prefers_onednn", lambda it=onednn: it and torch.backends.mkldnn.is_available())
            found = gemm.add_product(first, left, right)
            assert found.dtype == dtype and relative_error(found, expected) < torch.finfo(dtype).eps
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_a_linear_layer_is_torchs(monkeypatch: pytest.MonkeyPatch, onednn: bool, bias: bool) -> None:
    """With its gradients and theirs, by either library."""
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
    x, weight, vector = torch.randn(2, 5, 33), torch.randn(21, 33), torch.randn(21)
    leaves = [tensor.requires_grad_() for tensor in ((x, weight, vector) if bias else (x, weight))]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]

    def derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        out = function(*inputs)
        first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    for found, expected in zip(derivatives(linear, leaves), derivatives(F.linear, exact), strict=True):
        assert relative_error(found, expected) < 1e-5
    with torch.no_grad():
        assert relative_error(linear(*leaves), F.linear(*exact)) < 1e-6
    assert linear(*leaves[:2]).grad_fn is not None and linear(*(leaf.detach() for leaf in leaves)).grad_fn is None


def test_a_linear_layer_that_is_watched_or_not_float32_is_torchs_own() -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(4, 8)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 10 * 8 * 4
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x[:0], weight).shape == (0, 5, 4)
    assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_passes_with_and_without_units_for_it(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    """Every case, as a processor with bfloat16 units computes it and as one without: either may run these tests."""
    monkeypatch.setattr(gemm, "has_bfloat16_units", lambda: units)
    for case in cases_for("patch_embed", large=False):
        rows = check_case(backend_candidate("cpu"), case, "bfloat16")
        assert all(row.status == "passed" for row in rows), [str(row) for row in rows if row.status != "passed"]


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_or_pixels_are_normalised(monkeypatch: pytest.MonkeyPatch, folds: bool, dtype: str) -> None:
    """Every case both ways, raw pixels among them: a small batch takes the one, a large batch the other."""
    monkeypatch.setattr(patch_embed, "prefers_folding", lambda patches, dim: folds)
    for case in cases_for("patch_embed", large=False):
        rows = check_case(backend_candidate("cpu"), case, dtype)
        assert all(row.status == "passed" for row in rows), [str(row) for row in rows if row.status != "passed"]


@pytest.mark.parametrize("keep", [False, True])
def test_chunks_make_the_batch(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """One image at a time, in chunks with a rest, and all at once: the same tokens and gradients."""
    images, weight = torch.randn(5, 2, 8, 8), torch.randn(6, 2, 4, 4, requires_grad=True)
    kept = torch.randint(0, 4, (5, 3)) if keep else None
    size = (3 if keep else 4) * 32 * 4  # bytes of the patches of an image
    results = []
    for samples in (1, 2, 5):
        monkeypatch.setattr(patch_embed, "CHUNK_BYTES", samples * size)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert len(list(patch_embed.chunks(5, size))) == -(-5 // samples)
        tokens = functional.patch_embed(images, weight, keep=kept, backend="cpu")
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), weight)))
    for tokens, gradient in results[1:]:
        torch.testing.assert_close(tokens, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-4)
