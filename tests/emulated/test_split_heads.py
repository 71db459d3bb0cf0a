"""The CUDA kernel of split_heads, emulated, against float64 and against the CPU backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvit.cpu import split_heads as cpu
from fastvit.emulated import split_heads as emulated
from fastvit.emulated.call import emulation
from fastvit.validation import validate
from fastvit.validation.cases import DTYPES

B, H, T = 2, 3, 5
LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "by tokens": lambda width: torch.randn(B, T, H, width).transpose(1, 2),
    "turned": lambda width: torch.randn(B, H, width, T).transpose(2, 3),
    "cut out of 16 bytes more": lambda width: torch.randn(B, T, H, width + 8)[..., :width].transpose(1, 2),
    "cut so that strides are whole": lambda width: torch.randn(B, T, H, 16)[..., :width].transpose(1, 2),
    "moved": lambda width: torch.randn(B * T * H * width + 1)[1:].view(B, H, T, width),
    "one number": lambda width: torch.randn(()).expand(B, H, T, width),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case(dtype: str) -> None:
    report = validate(["emulated"], ["split_heads"], [dtype], device="cpu")
    assert report.ok, report.failures


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [8, 12, 16])
def test_strides_of_all_three_are_their_own(layout: str, width: int) -> None:
    torch.manual_seed(0)
    usual, other = LAYOUTS["by tokens"], LAYOUTS[layout]
    for place in range(3):
        three = [(other if i == place else usual)(width) for i in range(3)]
        (found, sums), (expected, truth) = (backend.backward(*three, True) for backend in (emulated, cpu))
        assert torch.equal(found, expected)
        torch.testing.assert_close(sums, truth)


def test_neither_schedule_nor_gpu_changes_anything() -> None:
    three = [torch.randn(1, 1, 2900, width) for width in (8, 8, 8)]
    first = emulated.backward(*three, True)
    with emulation(seed=1, processors=8):
        again = emulated.backward(*three, True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8)])
def test_no_rows(shape: tuple[int, ...], has_bias: bool) -> None:
    d_qkv, sums = emulated.backward(*(torch.empty(shape) for _ in range(3)), has_bias)
    assert d_qkv.shape == (shape[0], shape[2], 72) and torch.equal(sums, torch.zeros(72 if has_bias else 0))
