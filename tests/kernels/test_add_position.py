"""add_position and the row sums against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastvit import reference
from fastvit.validation.tolerance import compare

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def run(tokens: torch.Tensor, pos: torch.Tensor, prefix: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    from fastvit.kernels import add_position

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return add_position.forward(tokens, pos, prefix, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [1, 63, 64, 193])
@pytest.mark.parametrize("prefix_rows", [0, 1, 5])
@pytest.mark.parametrize("everywhere", [False, True])
def test_shapes(device: str, width: int, prefix_rows: int, everywhere: bool) -> None:
    tokens = torch.randn(3, 7, width, device=device)
    pos = torch.randn(7 + (prefix_rows if everywhere else 0), width, device=device)
    prefix = torch.randn(prefix_rows, width, device=device) if prefix_rows else None
    out = run(tokens, pos, prefix, FP32)
    assert torch.equal(out, reference.add_position(tokens, pos, prefix=prefix))


@pytest.mark.parametrize("out", [BF16, HALF, FP32])
@pytest.mark.parametrize("source", [BF16, HALF, FP32])
def test_dtypes(device: str, source: torch.dtype, out: torch.dtype) -> None:
    """Added in fp32 and rounded once."""
    for width in (16, 17):
        tokens = torch.randn(2, 5, width, device=device).to(source)
        pos, prefix = torch.randn(6, width, device=device).to(out), torch.randn(1, width, device=device)
        expected = reference.add_position(tokens.float(), pos.float(), prefix=prefix).to(out)
        assert torch.equal(run(tokens, pos, prefix, out), expected)


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_strides(device: str, strides: str) -> None:
    """A CNN's features come transposed."""
    tokens = {
        "transposed": lambda: torch.randn(2, 32, 5, device=device).transpose(1, 2),
        "sliced": lambda: torch.randn(4, 10, 64, device=device)[1::2, ::2, 16:48],
        "expanded": lambda: torch.randn(1, 5, 32, device=device).expand(2, -1, -1),
    }[strides]()
    pos = torch.randn(5, 32, device=device)
    assert torch.equal(run(tokens, pos, None, FP32), tokens + pos)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    from fastvit.kernels import add_position

    prefix = torch.randn(2, shape[2], device=device)
    out = run(torch.randn(shape, device=device), torch.randn(shape[1], shape[2], device=device), prefix, FP32)
    assert torch.equal(out[:, :2], prefix.expand(shape[0], -1, -1))
    assert out.shape == (shape[0], shape[1] + 2, shape[2])
    assert not add_position.backward(torch.ones(0, 5, 16, device=device)).any()


@pytest.mark.parametrize("dtype", [BF16, HALF, FP32])
@pytest.mark.parametrize("shape", [(1, 3, 16), (2, 7, 63), (70, 2, 16), (300, 1, 17)], ids=str)
def test_backward(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from fastvit.kernels import add_position

    grad = torch.randn(shape, device=device).to(dtype)
    found = add_position.backward(grad)
    assert found.dtype == FP32
    result = compare(found, grad.float().sum(0), grad.double().sum(0), "d_rows")
    assert result.passed, str(result)
    assert torch.equal(found, add_position.backward(grad))


def test_sum_by_key(device: str) -> None:
    """Keys repeat, are out of range, and leave segments empty."""
    from fastvit.kernels.row_sums import sum_by_key

    keys = torch.tensor([[0, 3, 3, -1, 9], [3, 5, 0, 0, 2**40]], device=device)
    for width in (16, 17):
        grad = torch.randn(2, 7, width, device=device)
        expected = torch.zeros(6, width, device=device, dtype=torch.float64)
        for batch, place in ((b, j) for b in range(2) for j in range(5)):
            if 0 <= keys[batch, place] < 6:
                expected[keys[batch, place]] += grad[batch, 2 + place].double()
        torch.testing.assert_close(sum_by_key(grad, keys, 6, 2, FP32).double(), expected, rtol=1e-6, atol=1e-6)


def test_unaligned_gradient(device: str, make: Callable) -> None:
    """A contiguous view that does not start at 16 bytes takes the kernels for any address."""
    from fastvit.kernels import add_position

    grad = torch.randn(2 * 3 * 16 + 1, device=device)[1:].view(2, 3, 16)
    assert torch.equal(add_position.backward(grad), grad.sum(0))
