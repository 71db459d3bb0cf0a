"""The CUDA kernels of bias_act, emulated, against float64 and against the CPU backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastvit.cpu import bias_act as cpu
from fastvit.emulated import bias_act as emulated
from fastvit.emulated.call import emulation
from fastvit.validation import validate
from fastvit.validation.cases import DTYPES

FLOATS = tuple(DTYPES.values())
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case(dtype: str) -> None:
    report = validate(["emulated"], ["bias_act"], [dtype], device="cpu")
    assert report.ok, report.failures


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [16, 5])
def test_every_mix_of_types(dtype: torch.dtype, width: int) -> None:
    for bias, up_bias, out in itertools.product(FLOATS, repeat=3):
        arguments = given(dtype, bias, up_bias, out, width=width)
        agree(both(emulated, arguments), both(cpu, arguments))


@pytest.mark.parametrize("width", [6, 12, 24])  # of the halves, the rows being 2 bytes, 8 bytes or 16 bytes from whole
@pytest.mark.parametrize("gate_last", [False, True])
def test_halves_lie_where_they_lie(gate_last: bool, width: int) -> None:
    x, bias, *_ = given(BF16, FP32, FP32, BF16, width=2 * width)
    arguments = (x, bias, None, None, "silu", gate_last, BF16)
    agree(both(emulated, arguments), both(cpu, arguments))


@pytest.mark.parametrize("which", range(4))
def test_an_unaligned_address_takes_the_scalar_path(which: int) -> None:
    arguments = given(BF16, FP32, BF16, BF16, width=40)
    expected = both(emulated, arguments)
    tensor = arguments[which]
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = room[1:].view(tensor.shape).copy_(tensor)
    assert moved.data_ptr() % 16
    found = both(emulated, (*arguments[:which], moved, *arguments[which + 1 :]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_neither_schedule_nor_gpu_changes_anything() -> None:
    arguments = given(BF16, FP32, FP32, BF16, batch=700, width=264)  # several rows a warp, and two tiles
    first = both(emulated, arguments)
    with emulation(seed=1, processors=8):
        again = both(emulated, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_no_rows(packed: bool) -> None:
    x, bias, up, up_bias, *rest = given(FP32, FP32, FP32, FP32, batch=0)
    arguments = (x, bias, None, None, "gelu", True, FP32) if packed else (x, bias, up, up_bias, *rest)
    out, d_x, d_up, sums = both(emulated, arguments)
    assert out.shape == (0, 5, 8 if packed else 16) and d_x.shape == x.shape and d_up.numel() == 0
    assert torch.equal(sums, torch.zeros(16 if packed else 32))


def given(
    x: torch.dtype, bias: torch.dtype, up_bias: torch.dtype, out: torch.dtype, batch: int = 2, width: int = 16
) -> tuple:
    """The forward's arguments, with two products."""
    torch.manual_seed(0)
    products = (torch.randn(batch, 5, width).to(x) for _ in range(2))
    vectors = (torch.randn(width).to(dtype) for dtype in (bias, up_bias))
    first, second = zip(products, vectors, strict=True)
    return (*first, *second, "gelu", None, out)


def both(backend: object, arguments: tuple) -> tuple[Tensor, ...]:
    """What forward and backward return; the gradient is the result, times two."""
    out = backend.forward(*arguments)  # type: ignore[attr-defined]
    return out, *backend.backward(out * 2, *arguments[:-1])  # type: ignore[attr-defined]


def agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        # Sums in another order may end on the other side of a rounding.
        distance = (tensor.double() - other.double()).norm()
        assert distance <= torch.finfo(BF16).eps * other.double().norm()
