"""Faults planted in what finds and sums the rows of images of any sizes: the emulation, or the comparison with float64,
catches each."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation.ops.patch_embed_packed import PackedCase
from tests.emulated.planted import Cases, Fault, Switched

UNIT, ROWS = "patch_embed_packed", "packed_rows.h"
HIGH = "is_prefix ? images.count : count_at_most(images, SORTED_STARTS, position)"
BASE = "std::min(base, reinterpret_cast<uintptr_t>(images.images[i].data))"

# Sizes that repeat, positions of every patch, none; columns by eight and singly, also where 16 bytes do not fit.
CASES: Cases = tuple(
    (case, torch.bfloat16, {})
    for case in (
        PackedCase("grid", sizes=((2, 3), (3, 2), (2, 3), (1, 4), (3, 2)), patch=(2, 2), width=24, prefix=2),
        PackedCase("rows", sizes=((2, 3), (1, 1), (3, 2)), patch=(2, 2), width=24, positions="rows", layout="mixed"),
        PackedCase("none", sizes=((4, 3), (1, 1)) * 6, patch=(2, 2), width=12, positions="none", prefix=0),
    )
)

FAULTS = tuple(
    Fault(name, UNIT, file, old, new, caught_by)
    for name, file, old, new, caught_by in (
        ("the image before", ROWS, "count_at_most(p, FIRST, m)", "count_at_most(p, FIRST, m > 0 ? m - 1 : 0)",
         "outside"),
        ("a row too many", ROWS, "if (m >= p.rows) return;", "", "outside"),
        ("columns that go on", ROWS, "index - y * grid_width", "index - y", "outside"),
        ("rows of the next image", ROWS, "field_of(p, ROW_STRIDE, image)",
         "field_of(p, ROW_STRIDE, (image + 1) % p.count)", "outside"),
        ("positions of the neighbour", ROWS, "field_of(p, START, image) + index",
         "field_of(p, START, (image + 1) % p.count) + index", "outside"),
        ("positions off by one", ROWS, "field_of(p, START, image) + index",
         "field_of(p, START, image) + (index > 0 ? index - 1 : 0)", "value"),
        ("prefixes forgotten", ROWS, "m + (image + 1) * p.prefix_rows", "m + p.prefix_rows", "outside"),
        ("images that only begin before", ROWS, "position - images.longest", "position - 1", "value"),
        ("images that begin here", ROWS, HIGH, HIGH.replace("position)", "position - 1)"), "value"),
        ("the last image's prefix", ROWS, HIGH, HIGH.replace("count :", "count - 1 :"), "value"),
        ("images as they stand", ROWS, "field_of(images, BY_START, is_one ? which + i : low)",
         "int64_t{is_one ? which + i : low}", "value"),
        ("the last patch of all", ROWS, "images.rows", "images.rows - 1", "value"),
        ("patches of the next image", ROWS, "is_one && n < last - first", "is_one", "value"),
        ("an image twice", ROWS, "is_one && n < last - first", "n < last - first", "value"),
        ("sums of one column", ROWS, "total[j] += is_there >> i & 1 ? values[i][j] : 0.0f;",
         "total[j] += is_there >> i & 1 ? values[i][0] : 0.0f;", "value"),
        ("16 bytes where none fit", "patch_embed_packed.cu", "width % EIGHT == 0 && is_aligned(grad.data)", "true",
         "misaligned"),
        ("positions dropped", "patch_embed_packed.cu", "inputs.positions.data", "nullptr", "value"),
        ("the image that comes first", "patch_embed_packed.cu", BASE, BASE.replace("std::min(base, ", "(i ? base : "),
         "outside"),
    )
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(planted: Switched, fault: Fault) -> None:
    planted.expect_caught(fault, CASES)


def test_without_a_fault_all_is_well(planted: Switched) -> None:
    assert planted.outcome(CASES) == ""
