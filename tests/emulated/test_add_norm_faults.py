"""Faults planted in the kernels of add_norm: the emulation, or the comparison with float64, catches each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvit.validation import AddNormCase
from tests.emulated.planted import SYNC, Cases, Fault, expect_caught, expect_nothing

NORM = "add_norm"

# Pieces of a row; single values; whole rows; a scale; and several rows a block, last, as it takes the longest.
CASES: Cases = tuple(
    (case, torch.bfloat16, {})
    for case in (
        AddNormCase("parts", tokens=1, width=2056, stream="float32", parameters="mixed"),
        AddNormCase("single", tokens=5, width=63, stream="float32", parameters="mixed", scale=True),
        AddNormCase("whole", tokens=17, width=384, rms=True),
        AddNormCase(
            "scaled", batch=4, tokens=3, width=264, stream="float32", parameters="mixed", scale=True, keep=True
        ),
        AddNormCase("steps", batch=1, tokens=1060, width=264, scale=True),
    )
)

FAULTS = (
    Fault(
        "no barrier in the sum over a row",
        NORM,
        "add_norm.h",
        f"{SYNC}\n  for (int other = first;",
        "for (int other = first;",
        "shared word",
    ),
    Fault(
        "both sums over a row in one slot",
        NORM,
        "add_norm.h",
        "sum_over_row(squares, p.lanes, 1)",
        "sum_over_row(squares, p.lanes, 0)",
        "race",
    ),
    Fault(
        "sums over rows in one slot",
        NORM,
        "add_norm.h",
        "step / p.groups % 2)",
        "0)",
        "race",
    ),
    Fault(
        "warps of another row",
        NORM,
        "add_norm.h",
        "= simt::thread_index() / lanes * (lanes / 32);",
        "= 0;",
        "value",
    ),
    Fault(
        "rows that are not there",
        NORM,
        "parts.h",
        "count(row < rows ? width - column : 0)",
        "count(width - column)",
        "outside",
    ),
    Fault(
        "statistics of rows that are not there",
        NORM,
        "add_norm.h",
        "if (is_row && lane == 0)",
        "if (lane == 0)",
        "second write",
    ),
    Fault(
        "columns that are not there",
        NORM,
        "numeric.h",
        "if (count <= 0) return;\n  const char*",
        "const char*",
        "outside",
    ),
    Fault(
        "columns that are not there, written",
        NORM,
        "numeric.h",
        "if (count <= 0) return;\n  char*",
        "char*",
        "outside",
    ),
    Fault(
        "the half of a store",
        NORM,
        "numeric.h",
        "(first + 16, simt::Vector<4>{{words[4]",
        "(first, simt::Vector<4>{{words[4]",
        "second write",
    ),
    Fault(
        "a value too many, loaded",
        NORM,
        "numeric.h",
        "words[i] = i < count ? simt::load_element(elements + i) : 0;",
        "words[i] = simt::load_element(elements + i);",
        "outside",
    ),
    Fault(
        "half a word too many, loaded",
        NORM,
        "numeric.h",
        "if (i < count) words[i / 2] |=",
        "words[i / 2] |=",
        "outside",
    ),
    Fault(
        "a value too many, stored",
        NORM,
        "numeric.h",
        "if (i < count) simt::store_element(elements + i, words[i]);",
        "simt::store_element(elements + i, words[i]);",
        "second write",
    ),
    Fault(
        "half a word too many, stored",
        NORM,
        "numeric.h",
        "if (i < count) simt::store_element(elements + i, static_cast",
        "simt::store_element(elements + i, static_cast",
        "second write",
    ),
    Fault(
        "the other half of a word",
        NORM,
        "numeric.h",
        "words[i / 2] >> (16 * (i % 2))",
        "words[i / 2] >> (16 * (1 - i % 2))",
        "value",
    ),
    Fault(
        "a variance of columns that are not there",
        NORM,
        "add_norm.h",
        "i < part.count ? values[i] * values[i] : 0.0f",
        "values[i] * values[i]",
        "value",
    ),
    Fault(
        "the factor of another sample",
        NORM,
        "add_norm.h",
        "is_row ? simt::load_element(p.keep + part.row / p.tokens)",
        "is_row ? simt::load_element(p.keep + part.row % p.tokens % 2)",
        "value",
    ),
    Fault(
        "the factor of another sample, backward",
        NORM,
        "add_norm.h",
        "keep = simt::load_element(p.keep + part.row / p.tokens)",
        "keep = simt::load_element(p.keep)",
        "value",
    ),
    Fault(
        "the mean of an RMS norm",
        NORM,
        "add_norm.h",
        "sum[0] / p.width * p.centre",
        "sum[0] / p.width",
        "value",
    ),
    Fault(
        "the mean of an RMS norm, backward",
        NORM,
        "add_norm.h",
        "sums[1] / p.width * p.centre",
        "sums[1] / p.width",
        "value",
    ),
    Fault(
        "a deviation for a mean",
        NORM,
        "add_norm.h",
        "{simt::load_element(p.statistics + part.row),",
        "{simt::load_element(p.statistics + p.rows + part.row),",
        "value",
    ),
    Fault(
        "the parts of other blocks left out",
        NORM,
        "add_norm.h",
        "if (other != column) add_other_part",
        "if (false) add_other_part",
        "value",
    ),
    Fault(
        "one part of a row for all blocks",
        NORM,
        "add_norm.h",
        "column = simt::block_y() * columns + first_column",
        "column = first_column",
        "second write",
    ),
    Fault(
        "rows of the next block",
        NORM,
        "add_norm.h",
        "first + p.rows_per_block < p.rows ? first + p.rows_per_block : p.rows",
        "first + p.rows_per_block",
        "outside",
    ),
    Fault(
        "partial sums in one row",
        NORM,
        "add_norm.h",
        "static_cast<int64_t>(simt::block_x()) * p.vectors",
        "static_cast<int64_t>(0) * p.vectors",
        "second write",
    ),
    Fault(
        "no barrier before the block's sums",
        NORM,
        "parts.h",
        "simt::sync_threads();  // what lay there has been read",
        "",
        "race",
    ),
    Fault(
        "no barrier behind the block's sums",
        NORM,
        "parts.h",
        f"{SYNC}\n  if (thread >= lanes) return;",
        "if (thread >= lanes) return;",
        "shared word",
    ),
    Fault(
        "sums of the first group alone",
        NORM,
        "parts.h",
        "other < lanes * groups; other += lanes",
        "other < lanes; other += lanes",
        "value",
    ),
    Fault(
        "sums side by side",
        NORM,
        "parts.h",
        "16 * (i / 4 * PART_THREADS + thread)",
        "16 * (2 * thread + i / 4)",
        "bank conflict",
    ),
    Fault(
        "the bias left out of the scale's gradient",
        NORM,
        "add_norm.h",
        "d_scale[i] += d_change[i] * bias[i];",
        "",
        "value",
    ),
    Fault(
        "the bias's gradient unscaled",
        NORM,
        "add_norm.h",
        "d_change[i] *= scale[i];",
        "",
        "value",
    ),
    Fault(
        "no barrier in the last sum",
        "row_sums",
        "row_sums.cu",
        f"{SYNC}\n  if (warp > 0",
        "if (warp > 0",
        "shared word",
    ),
    Fault(
        "the last partial sum dropped",
        "row_sums",
        "row_sums.cu",
        "(p.rows - warp + WARPS - 1) / WARPS",
        "(p.rows - warp) / WARPS",
        "value",
    ),
    Fault(
        "columns of partial sums that are not there",
        "row_sums",
        "row_sums.cu",
        "if (column < p.columns) {",
        "if (true) {",
        "outside",
    ),
    Fault(
        "sums that are not there",
        "row_sums",
        "row_sums.cu",
        "if (warp > 0 || column >= p.columns) return;",
        "if (warp > 0) return;",
        "outside",
    ),
    Fault(
        "16 bytes where none fit",
        NORM,
        "parts.h",
        "return width % EIGHT == 0 &&",
        "return width > 0 &&",
        "misaligned",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    expect_caught(fault, CASES, tmp_path)


def test_without_a_fault_all_is_well() -> None:
    expect_nothing(CASES)
