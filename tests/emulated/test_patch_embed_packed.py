"""The CUDA kernels of patch_embed_packed, emulated: by the validator's rule, and what it does not vary."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastvit.emulated.call import emulation
from fastvit.validation import make_inputs
from fastvit.validation.cases import DTYPES
from fastvit.validation.ops.patch_embed_packed import OP, PackedCase
from fastvit.validation.runner import backend_candidate, check_inputs
from tests.emulated.test_patch_embed import hold

_hold = functools.partial(hold, op="patch_embed_packed")
SIZES = ((5, 6), (1, 1), (2, 9), (7, 3), (5, 6), (4, 4), (3, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OP.tiny, ids=lambda case: case.name)
def test_every_case(case: PackedCase, dtype: str) -> None:
    _hold(make_inputs(case, DTYPES[dtype]), gradients=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [{}, {"processors": 1}, {"processors": 1, "capability": 90}], ids=str)
@pytest.mark.parametrize("images", ["uint8", "same"])
def test_more_rows_and_columns_than_a_tile(images: str, device: dict[str, Any], dtype: str) -> None:
    case = PackedCase("tiles", sizes=SIZES, channels=4, width=200, prefix=2, images=images, normalise=True)
    with emulation(**device):
        _hold(make_inputs(case, DTYPES[dtype]))


@pytest.mark.parametrize("positions", ["none", "rows"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "packed"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_steps_of_large_tiles(channels: int, layout: str, positions: str) -> None:
    case = PackedCase("steps", sizes=((2, 3), (1, 4)), channels=channels, width=144, layout=layout, positions=positions)
    with emulation(processors=1):
        _hold(make_inputs(case, torch.bfloat16), gradients=3)


def test_tensor_cores_multiply_float32_where_they_may() -> None:
    case = PackedCase("tf32", sizes=SIZES, channels=4, width=136)
    inputs = make_inputs(case, torch.float32)
    candidate = backend_candidate("emulated")
    errors = []
    for tf32 in (False, True):
        with emulation(processors=1, tf32=tf32):
            forward = check_inputs(candidate, "patch_embed_packed", inputs)[0]
            errors.append(forward.error)
    assert errors[0] < 1e-6 < 1e-5 < errors[1] < 1e-3, errors


def test_memory_may_have_the_images_in_any_order() -> None:
    case = PackedCase("order", sizes=SIZES, channels=1, patch=(2, 2), width=24, images="uint8")
    inputs = make_inputs(case, torch.bfloat16)
    memory = torch.cat([inputs[f"images[{i}]"].flatten() for i in reversed(range(len(SIZES)))])
    end = len(memory)
    for i in range(len(SIZES)):
        shape = inputs[f"images[{i}]"].shape
        inputs.tensors[f"images[{i}]"] = memory[end - shape.numel() : end].view(shape)
        end -= shape.numel()
    _hold(inputs)
