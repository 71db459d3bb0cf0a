"""Faults planted in the kernels of bias_act: the emulation, or the comparison with float64, catches each. Those of what
it shares with add_norm are in test_add_norm_faults.py."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation import BiasActCase
from tests.emulated.planted import Cases, Fault, Switched

ACT = "bias_act"

# Single values of two products; halves of a row; the other functions; and several rows a warp in two tiles.
CASES: Cases = tuple(
    (case, torch.bfloat16, {})
    for case in (
        BiasActCase("single", batch=1, tokens=3, width=9, up=True, parameters="mixed"),
        BiasActCase("halves", batch=1, tokens=3, width=12, act="silu", gate_last=True),
        BiasActCase("tanh", batch=1, tokens=2, width=16, act="gelu_tanh", bias=False),
        BiasActCase("relu", batch=1, tokens=2, width=16, act="relu"),
        BiasActCase("steps", batch=1, tokens=1660, width=264, act="relu"),
    )
)

FAULTS = tuple(
    Fault(name, ACT, f"bias_act.{suffix}", old, new, caught_by)
    for name, suffix, old, new, caught_by in (
        ("one tile for all blocks", "h", "simt::block_y() * ACT_COLUMNS", "0", "second write"),
        ("one block for all rows", "h", "simt::block_x() * ACT_ROWS * PART_WARPS", "0", "second write"),
        ("rows that are not there", "h", "load_part<WIDE>(p.x, part, x[i]);",
         "load_words<WIDE>(p.x, part.place, p.width - column, x[i]);", "outside"),
        ("rows that are not there, written", "h", "store_words<WIDE>(p.out, part.place, part.count, x[i]);",
         "store_words<WIDE>(p.out, part.place, p.width - column, x[i]);", "outside"),
        ("rows of the next block", "h", "first + p.rows_per_block < of.rows ? first + p.rows_per_block : of.rows",
         "first + p.rows_per_block", "outside"),
        ("rows of the next warp", "h", "row += PART_WARPS", "row++", "second write"),
        ("halves of the next row", "h", "p.row_stride", "p.width", "value"),
        ("halves of the next row, backward", "h", "of.row_stride", "of.width", "second write"),
        ("the bias dropped", "h", "values[i] += bias[i];", "", "value"),
        ("the bias of up dropped", "h", "add_bias(p.up.type, up[i], up_bias, factor);",
         "from_words(p.up.type, up[i], factor);", "value"),
        ("another slope at zero", "h", "at[i] <= 0 ? 0 : 1", "at[i] <= 1 ? 0 : 1", "value"),
        ("the slope without its bend", "h", "p.linear + 3 * bend", "p.linear + bend", "value"),
        ("partial sums in one row", "h", "simt::block_x() * p.partials_stride", "0", "second write"),
        ("the sums of both in one place", "h", "p.of_up + place", "p.partials + place", "second write"),
        ("sums that nobody wants", "h", "if (!p.partials) return;", "", "outside"),
        ("the halves changed", "cu", "*inputs.gate_last", "!*inputs.gate_last", "value"),
        ("16 bytes of halves that lie at eight", "cu", "is_wide(p.width, {p.x, p.up, p.bias, p.up_bias, p.out})",
         "is_wide(2 * p.width, {p.out})", "misaligned"),
        ("16 bytes of their gradients", "cu",
         "is_wide(of.width, {of.x, of.up, of.bias, of.up_bias, of.out, p.d_x, p.d_up})",
         "is_wide(2 * of.width, {of.out})", "misaligned"),
    )
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(planted: Switched, fault: Fault) -> None:
    planted.expect_caught(fault, CASES)


def test_without_a_fault_all_is_well(planted: Switched) -> None:
    assert planted.outcome(CASES) == ""
