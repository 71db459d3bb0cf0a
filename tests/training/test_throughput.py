"""How fast a run is: what is counted, over which time, and what goes by as waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit.training.throughput import PEAKS, SPAN, Rate, Throughput, flops_of, tokens_of
from tests.libraries import peer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_of_the_last_seconds() -> None:
    clock = Clock()
    speed = Throughput(lambda tokens: 10.0 * tokens, clock)
    assert speed.rate() == Rate(0, 0, 0)
    clock.now += 2
    speed.count(8, [5, 5])
    assert speed.rate() == Rate(4, 50, 0)
    for _ in range(60):  # faster from now on
        clock.now += 1
        speed.count(32, [5] * 4)
    assert speed.rate() == Rate(32, 200, 0)
    clock.now += 1000  # an evaluation
    speed.pause()
    clock.now += 1
    speed.count(16, [])
    assert speed.rate() == Rate(16, 0, 0)
    assert len(speed._marks) <= SPAN + 2


def test_waiting_is_the_time_until_a_batch_is_there() -> None:
    clock = Clock()
    speed = Throughput(lambda tokens: 0.0, clock)

    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 3
            yield number

    for _ in speed.watched(slow()):
        clock.now += 1
        speed.count(1, [])
    assert speed.rate().waiting == pytest.approx(0.75)
    assert speed.rate().words(0) == "0 img/s  0 GFLOP/s  loader wait 75%"
    assert Rate(1234.5, 4e14, 0.031).words(989.5e12) == "1,234 img/s  MFU 40.4%  loader wait 3%"


def test_by_the_clock_of_the_machine() -> None:
    speed = Throughput(lambda tokens: 1.0)
    time.sleep(0.02)
    speed.count(1, [1])
    assert 0 < speed.rate().images <= 50


@pytest.mark.parametrize("given", [{}, {"reg_tokens": 2, "init_values": 0.1, "patch_size": 8, "mlp_ratio": 3.0}])
def test_flops_are_those_that_torch_counts(given: dict[str, float]) -> None:
    timm = peer("timm.models.vision_transformer")
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
    arguments: dict[str, Any] = {**sizes, **given}
    # By products of matrices, which torch counts; attention on a CPU it does not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        timm.VisionTransformer(**arguments)(torch.randn(1, 3, 32, 32))
    ours = fastvit.VisionTransformer(**arguments)
    assert flops_of(ours)(tokens_of(ours)) == 3 * counted.get_total_flops()


def test_no_gpu_is_taken_for_another() -> None:
    names = list(PEAKS)
    for index, name in enumerate(names):
        assert not any(other in name for other in names[:index]), f"{name} would be taken for one before it"
