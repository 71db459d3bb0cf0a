"""The CUDA kernels of add_norm, emulated, against float64 and against the CPU backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastvit.cpu import add_norm as cpu
from fastvit.emulated import add_norm as emulated
from fastvit.emulated.call import emulation
from fastvit.validation import AddNormCase, make_inputs
from fastvit.validation.cases import DTYPES
from fastvit.validation.runner import backend_candidate, check_inputs

FLOATS = tuple(DTYPES.values())
Results = tuple[Tensor, ...]


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("width", [1, 63, 193, 384, 1048, 2056, 4096, 8192])
def test_every_width(width: int, is_scaled: bool) -> None:
    case = AddNormCase(
        "width", tokens=3, width=width, stream="float32", parameters="mixed", scale=is_scaled, keep=is_scaled
    )
    for row in check_inputs(backend_candidate("emulated"), "add_norm", make_inputs(case, torch.bfloat16), case.name):
        assert row.status == "passed", row


@pytest.mark.parametrize("residual", FLOATS)
@pytest.mark.parametrize("width", [16, 5])
def test_every_mix_of_types(residual: torch.dtype, width: int) -> None:
    for mix in itertools.product(FLOATS, repeat=3):
        arguments = given(residual, *mix, width=width)
        found, expected = (both(backend, arguments, residual) for backend in (emulated, cpu))
        for tensor, other in zip(found, expected, strict=True):
            assert tensor.dtype == other.dtype and tensor.shape == other.shape
            # Sums in another order may end on the other side of a rounding.
            distance = (tensor.double() - other.double()).norm()
            assert distance <= torch.finfo(torch.bfloat16).eps * other.double().norm()


def test_the_norm_is_that_of_the_rounded_sum() -> None:
    total, _, statistics = emulated.forward(*given(*(torch.bfloat16,) * 4, width=384))
    assert torch.allclose(statistics[0], total.float().mean(-1).flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("which", range(7))
def test_an_unaligned_address_takes_the_scalar_path(which: int) -> None:
    arguments = given(*FLOATS, torch.float32, width=40)
    expected = both(emulated, arguments, torch.float32)
    tensor = arguments[which]
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = room[1:].view(tensor.shape).copy_(tensor)
    assert moved.data_ptr() % 16
    found = both(emulated, (*arguments[:which], moved, *arguments[which + 1 :]), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("width", [72, 384, 2056])
def test_neither_schedule_nor_gpu_changes_anything(width: int) -> None:
    arguments = given(torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, width=width)
    first = both(emulated, arguments, torch.float32)
    for seed, processors in ((1, 132), (2, 8), (3, 300)):
        with emulation(seed=seed, processors=processors):
            again = both(emulated, arguments, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_rows() -> None:
    total, normed, statistics, d_residual, d_branch, d_vectors = both(
        emulated, given(*(torch.float32,) * 4, batch=0), torch.float32
    )
    assert total.shape == normed.shape == d_residual.shape == d_branch.shape == (0, 5, 16)
    assert statistics.shape == (2, 0) and torch.equal(d_vectors, torch.zeros(4, 16))


def given(
    residual: torch.dtype, branch: torch.dtype, total: torch.dtype, normed: torch.dtype, batch: int = 2, width: int = 16
) -> tuple:
    """The forward's arguments; bias, scale, weight and norm_bias of the four dtypes in turn."""
    torch.manual_seed(0)
    bias, scale, weight, norm_bias = (torch.randn(width).to(dtype) for dtype in (total, normed, residual, branch))
    rows = (torch.randn(batch, 5, width).to(dtype) for dtype in (residual, branch))
    return (*rows, bias, scale, torch.rand(batch), weight, norm_bias, 1e-6, False, total, normed)


def both(backend: object, arguments: tuple, residual_dtype: torch.dtype) -> Results:
    """What forward and backward return; the gradients are those of the results, each times two."""
    total, normed, statistics = backend.forward(*arguments)  # type: ignore[attr-defined]
    branch, bias, scale, keep, weight, norm_bias = arguments[1:7]
    found = backend.backward(  # type: ignore[attr-defined]
        total, normed * 2, total * 2, branch, bias, scale, keep, weight, norm_bias, statistics, False, residual_dtype
    )
    return total, normed, statistics, *found
