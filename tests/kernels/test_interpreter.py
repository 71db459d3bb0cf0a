"""The mend of the interpreter's bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastvit.backend import triton_is_interpreted

pytestmark = pytest.mark.skipif(not triton_is_interpreted(), reason="TRITON_INTERPRET is not set")


def test_rounding_is_torchs() -> None:
    from fastvit.kernels.interpreter import bfloat16_to_float32, float32_to_bfloat16

    values = torch.cat(
        (
            torch.randn(10000),
            torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, float("inf"), float("-inf"), float("nan")]),
        )
    )
    bits = float32_to_bfloat16(values.numpy())
    expected = values.to(torch.bfloat16)
    widened = torch.from_numpy(bfloat16_to_float32(bits))
    assert torch.equal(widened.nan_to_num(7.0), expected.float().nan_to_num(7.0))
    assert np.isnan(widened.numpy()[-1])


def _kernels():  # type: ignore[no-untyped-def]
    import triton
    import triton.language as tl

    from fastvit.kernels import interpreter

    assert interpreter.mend()

    @triton.jit
    def dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        place = i[:, None] * SIZE + i[None, :]
        product = tl.dot(tl.load(a_ptr + place).to(tl.bfloat16), tl.load(b_ptr + place).to(tl.bfloat16))
        tl.store(out_ptr + place, product)

    @triton.jit
    def add(a_ptr, out_ptr, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(out_ptr + i, tl.load(a_ptr + i) + tl.load(a_ptr + i))

    @triton.jit
    def total(a_ptr, out_ptr, SIZE: tl.constexpr):
        tl.store(out_ptr, tl.sum(tl.load(a_ptr + tl.arange(0, SIZE)), axis=0))

    return dot, add, total


def test_dot_and_casts(device: str) -> None:
    dot, _, _ = _kernels()
    for a in (torch.randint(0, 256, (16, 16), dtype=torch.uint8), torch.randn(16, 16), torch.randn(16, 16).bfloat16()):
        b, out = torch.randn(16, 16), torch.empty(16, 16)
        dot[(1,)](a.to(device), b.to(device), out, SIZE=16)
        expected = a.bfloat16().double() @ b.bfloat16().double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("place", [1, 2], ids=["add", "sum"])
def test_other_arithmetic_raises(place: int) -> None:
    kernel = _kernels()[place]
    out = torch.empty(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="bfloat16"):
        kernel[(1,)](torch.randn(16).bfloat16(), out, SIZE=16)
