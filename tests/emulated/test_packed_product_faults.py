"""Faults planted in the products of images of any sizes: the emulation, or the comparison with float64, sees each."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation.ops.patch_embed_packed import PackedCase
from tests.emulated.planted import Cases, Fault, Switched

UNIT = "patch_embed_packed_bfloat16"

CASES: Cases = tuple(
    (case, torch.bfloat16, device)
    for case, device in (
        (PackedCase("wide", sizes=((2, 3), (3, 2), (1, 4)), channels=2, width=24, prefix=2), {}),
        (PackedCase("single", sizes=((2, 3), (1, 2)), patch=(3, 3), width=12, images="uint8", positions="rows"), {}),
        (PackedCase("large", sizes=((5, 6), (9, 5), (3, 8), (8, 9)), channels=2, width=136), {"processors": 1}),
    )
)

FAULTS = tuple(
    Fault(name, UNIT, f"patch_embed_{file}.h", old, new, caught_by)
    for name, file, old, new, caught_by in (
        ("strides for all", "forward", "walk.offset(own)", "walk.offset(strides)", "value"),
        ("a position for all", "forward", "static_cast<int64_t>(at.position)", "int64_t{0}", "value"),
        ("tokens without their prefixes", "forward", "static_cast<int64_t>(at.token)", "int64_t{m}", "outside"),
        ("prefixes side by side", "forward", "simt::load_element(p.pixels.packed.table + image) + before", "before",
         "outside"),
        ("the prefix for the bias", "forward", "static_cast<int64_t>(p.prefix_rows) * p.width", "int64_t{0}", "value"),
        ("sums unscaled", "forward", "position[i] + sums[i] * p.scale", "position[i] + sums[i]", "value"),
        ("strides for all, backward", "weight_gradient", "walk.offset(own)", "walk.offset(strides)", "value"),
        ("tokens without their prefixes, backward", "weight_gradient",
         "load_token(p.pixels.packed.tokens + m).token", "m", "value"),
    )
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(planted: Switched, fault: Fault) -> None:
    planted.expect_caught(fault, CASES)


def test_without_a_fault_all_is_well(planted: Switched) -> None:
    assert planted.outcome(CASES) == ""
