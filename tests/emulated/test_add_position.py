"""The CUDA kernels of add_position, emulated, against float64, and bit for bit against the CPU backend."""

from __future__ import annotations

import pytest
import torch

from fastvit.cpu import add_position as cpu
from fastvit.emulated import add_position as emulated
from fastvit.emulated.call import emulation
from fastvit.validation import AddPositionCase, make_inputs
from fastvit.validation.cases import DTYPES
from fastvit.validation.ops.add_position import OP


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OP.tiny, ids=lambda case: case.name)
def test_every_case(case: AddPositionCase, dtype: str) -> None:
    inputs = make_inputs(case, DTYPES[dtype])
    tokens, pos_embed, prefix = (inputs.tensors[name] for name in ("tokens", "pos_embed", "prefix"))
    assert tokens is not None and pos_embed is not None
    expected = cpu.forward(tokens, pos_embed, prefix, inputs.out)
    found = emulated.forward(tokens, pos_embed, prefix, inputs.out)
    assert found.dtype == inputs.out and torch.equal(found, expected)  # one sum in float32, rounded once
    exact = inputs.grad.double().sum(0)
    torch.testing.assert_close(emulated.backward(inputs.grad).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_schedule_changes_nothing(seed: int) -> None:
    inputs = make_inputs(AddPositionCase("schedules", batch=19, patches=5, width=72), torch.bfloat16)
    tokens, pos_embed, prefix = (inputs.tensors[name] for name in ("tokens", "pos_embed", "prefix"))
    assert tokens is not None and pos_embed is not None
    first = emulated.forward(tokens, pos_embed, prefix, inputs.out), emulated.backward(inputs.grad)
    with emulation(seed=seed):
        again = emulated.forward(tokens, pos_embed, prefix, inputs.out), emulated.backward(inputs.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_unaligned_address_takes_the_scalar_path() -> None:
    whole = torch.randn(2 * 3 * 16 + 1, dtype=torch.bfloat16)
    tokens = whole[1:].view(2, 3, 16)
    assert tokens.data_ptr() % 16
    positions = torch.randn(3, 16, dtype=torch.bfloat16)
    found = emulated.forward(tokens, positions, None, torch.bfloat16)
    assert torch.equal(found, cpu.forward(tokens, positions, None, torch.bfloat16))
