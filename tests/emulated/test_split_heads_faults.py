"""Faults planted in the kernel of split_heads: the emulation, or the comparison with float64, catches each. Those of
what it shares with add_norm are in test_add_norm_faults.py."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation import SplitHeadsCase
from tests.emulated.planted import Cases, Fault, Switched

HEADS = "split_heads"

# Eight columns a lane; single ones in two tiles; places that 16 bytes do not fit; and several rows a warp.
CASES: Cases = tuple(
    (case, torch.bfloat16, {})
    for case in (
        SplitHeadsCase("wide", tokens=5, heads=3, width=8),
        SplitHeadsCase("single", tokens=3, heads=7, width=5),
        SplitHeadsCase("cut", tokens=3, heads=2, width=8, gradients="cut"),
        SplitHeadsCase("no bias", tokens=2, heads=1, width=8, bias=False),
        SplitHeadsCase("steps", batch=1, tokens=2900, heads=1, width=8),
    )
)

FAULTS = tuple(
    Fault(name, HEADS, f"split_heads.{suffix}", old, new, caught_by)
    for name, suffix, old, new, caught_by in (
        ("queries for keys and values", "h", "which == 0 ? p.d_q : which == 1 ? p.d_k : p.d_v", "p.d_q", "value"),
        ("the next head", "h", "head * from.head", "(head + 1) % (p.width / p.head_width) * from.head", "value"),
        ("the next image", "h", "image * from.batch", "(image + 1) * from.batch", "outside"),
        ("tokens of another image", "h", "p.over_tokens.remainder(here, image)", "here", "outside"),
        ("one tile for all blocks", "h", "(simt::block_y() - which * tiles) * COLUMNS", "0", "second write"),
        ("one of the three for all blocks", "h", "which * int64_t{p.width}", "0", "second write"),
        ("columns that are not there", "h", "column < p.width ? COUNT : 0", "COUNT", "outside"),
        ("rows that are not there", "h", "load_words<WIDE>(from.elements, place, here < end ? count : 0, words[i]);",
         "load_words<WIDE>(from.elements, place, count, words[i]);", "outside"),
        ("rows that are not there, written", "h",
         "store_words<WIDE>(p.d_qkv, here * p.packed_width + packed, here < end ? count : 0, words[i]);",
         "store_words<WIDE>(p.d_qkv, here * p.packed_width + packed, count, words[i]);", "outside"),
        ("rows of the next block", "h", "first + p.rows_per_block < p.rows ? first + p.rows_per_block : p.rows",
         "first + p.rows_per_block", "outside"),
        ("rows of the next step", "h", "row += HEADS_ROWS * PART_WARPS", "row += PART_WARPS", "second write"),
        ("the bias's sums dropped", "h", "sums[j] += values[j];", "", "value"),
        ("partial sums in one row", "h", "simt::block_x() * p.packed_width", "0", "second write"),
        ("sums that nobody wants", "h", "if (!p.partials) return;", "", "outside"),
        ("16 bytes where none fit", "cu", "fits && is_aligned(from.elements.data)", "true", "misaligned"),
    )
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(planted: Switched, fault: Fault) -> None:
    planted.expect_caught(fault, CASES)


def test_without_a_fault_all_is_well(planted: Switched) -> None:
    assert planted.outcome(CASES) == ""
