"""Faults planted in the processor's own ops on rows: the comparison with float64 catches each."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation.cases import cases_for
from tests.native.planted import Fault

OPS = ("add_norm", "add_position", "bias_act", "split_heads")
ONLY = "portable"  # which rounds to bfloat16 by itself
CASES = tuple(
    (case, dtype) for dtype in (torch.float32, torch.bfloat16) for op in OPS for case in cases_for(op, large=False)
)

FAULTS = (
    Fault("a tail is dropped", "vector.h", "column < width", "width < 0"),
    Fault("what lies behind a row counts", "add_norm.cpp", "first_of(load(values + i) - mean, n)",
          "(load(values + i) - mean)"),
    Fault("the bias is dropped", "add_norm.cpp", "(load(branch + i, n) + load(bias + i))",
          "load(branch + i, n)"),
    Fault("the stream's gradient is lost", "add_norm.cpp", "load(d_sum + place, n)", "Floats{}"),
    Fault("a chunk's last row is dropped", "threads.h", "chunk + 1 < count ? (chunk + 1) * size : rows",
          "chunk + 1 < count ? (chunk + 1) * size - 1 : rows"),
    Fault("bfloat16 is cut off", "vector.h", "bits + 0x7fff", "bits - (bits >> 16 & 1)"),
    Fault("ties of bfloat16 go up", "vector.h", "((bits >> 16) & 1)", "all_words(1)"),
    Fault("positions begin a row late", "add_position.cpp",
          "pointer_to<Any>(positions) + place", "pointer_to<Any>(positions) + (place - this->width)"),
    Fault("the slope forgets the density", "bias_act.cpp", "cdf + x * (0.3989422804f * power)", "cdf"),
)  # fmt: skip


def test_without_a_fault_nothing_is_wrong(found: dict[str, str]) -> None:
    assert found[""] == ""


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_a_fault_is_caught(found: dict[str, str], name: str) -> None:
    assert found[name], "not caught"
