"""The yardstick for kernels that multiply float32 at TF32 precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.validation import PatchEmbedCase, make_inputs
from fastvit.validation.ops.patch_embed import plain
from fastvit.validation.plain import tf32_conv2d


def _truncated(values: Tensor) -> Tensor:
    return torch.from_numpy((values.numpy().view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32))


def _exact_and_found(images: Tensor, weight: Tensor, grad: Tensor) -> list[list[Tensor]]:
    results = []
    for convolution, dtype in ((F.conv2d, torch.float64), (tf32_conv2d, torch.float32)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (images, weight)]
        out = convolution(*leaves, None, stride=weight.shape[2:])
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    return results


@pytest.mark.parametrize("patch", [(4, 4), (2, 6)])
def test_operands_of_eleven_bits_are_multiplied_as_they_are(patch: tuple[int, int]) -> None:
    images, weight = torch.randn(2, 3, 12, 12), torch.randn(8, 3, *patch)
    grad = torch.randn(2, 8, 12 // patch[0], 12 // patch[1])
    exact, found = _exact_and_found(*(_truncated(tensor) for tensor in (images, weight, grad)))
    for wanted, got in zip(exact, found, strict=True):
        assert got.dtype is torch.float32 and got.equal(wanted.float())


def test_others_are_rounded_to_the_nearest() -> None:
    ones = torch.ones(1, 1, 1, 1)
    steps = torch.tensor([1 + 2**-10, 1 + 2**-11 - 2**-20, 1 + 2**-11 + 2**-20, -3 - 2**-9 + 2**-20, 2**-130, 0.0])
    nearest = torch.tensor([1 + 2**-10, 1.0, 1 + 2**-10, -3 - 2**-9, 2**-130, 0.0])
    images = steps.view(6, 1, 1, 1)
    found = _exact_and_found(images, ones, images)[1]
    assert found[0].flatten().equal(nearest) and found[1].flatten().equal(nearest)
    assert _exact_and_found(torch.ones(6, 1, 1, 1), images[:1] + 2**-20, torch.ones(6, 1, 1, 1))[1][0][0] == nearest[0]


def test_not_finite_stays_so() -> None:
    images = torch.tensor([float("nan"), float("inf"), float("-inf")]).view(3, 1, 1, 1)
    out = tf32_conv2d(images, torch.ones(1, 1, 1, 1), None, stride=(1, 1)).flatten()
    assert out[0].isnan() and out[1] == float("inf") and out[2] == float("-inf")


def test_the_pipeline_at_tf32_is_the_pipeline_but_for_the_rounding() -> None:
    case = PatchEmbedCase("tf32", batch=2, grid=(3, 3), width=32, images="uint8", normalise=True)
    inputs = make_inputs(case, torch.float32)
    full, rounded = (plain(inputs, inputs.tensors, tf32=tf32) for tf32 in (False, True))
    error = float((full - rounded).norm() / full.norm())
    assert 2**-16 < error < 2**-11
