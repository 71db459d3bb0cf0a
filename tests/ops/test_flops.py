"""torch's FLOP counter counts the ops as it counts what they replace."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvit import functional

WEIGHT, POSITIONS, KEEP = (7, 3, 8, 8), (6, 7), torch.tensor([[0, 3], [5, 1]])


def counted(kind: str, images: Tensor, weight: Tensor, keep: Tensor | None = None) -> int:
    with FlopCounterMode(display=False) as counter:
        if kind == "fused":
            tokens = functional.patch_embed(images, weight, pos_embed=torch.zeros(POSITIONS), keep=keep)
        else:
            tokens = F.conv2d(images.to(weight.dtype), weight, stride=weight.shape[2:])
        if tokens.requires_grad:
            tokens.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs", [(False, False), (False, True), (True, False), (True, True)])
def test_as_the_convolution(needs: tuple[bool, bool]):
    images = torch.randn(2, 3, 16, 24, requires_grad=needs[0])
    weight = torch.randn(WEIGHT, requires_grad=needs[1])
    assert counted("fused", images, weight) == counted("convolution", images, weight) > 0


def test_kept_patches_alone():
    images, weight = torch.randn(2, 3, 16, 24), torch.randn(WEIGHT, requires_grad=True)
    assert 3 * counted("fused", images, weight, KEEP) == counted("convolution", images, weight)


def test_additions_are_free():
    with FlopCounterMode(display=False) as counter:
        functional.add_position(torch.randn(2, 6, 7), torch.randn(POSITIONS, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 0


def test_a_counter_that_counts_already_and_an_import_that_brings_none():
    program = """
import sys, torch
from fastvit import functional
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    functional.patch_embed(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.randn(5, 3, 8, 8))
assert counter.get_total_flops() == 2 * 4 * 5 * 3 * 64, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
