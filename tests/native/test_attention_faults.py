"""Faults planted in the processor's own attention: the comparison with float64 catches each."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation import AttentionCase
from fastvit.validation.cases import cases_for
from tests.native.planted import Fault

# Small ones of each kind, and sums that are longer than one chain.
LONG = AttentionCase("long", batch=1, tokens=300, heads=1, width=17)
CASES = tuple(
    (case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in (*cases_for("attention", large=False), LONG)
)

OPS = ("attention",)
FILE = "attention.cpp"
FAULTS = (
    Fault("scores without their scale", FILE, "exponentials(scores + i * op.score_columns, op.tokens, op.scale)",
          "exponentials(scores + i * op.score_columns, op.tokens, 1.0f)"),
    Fault("weights that are not divided by their sum", FILE, "1 / of_row[i].sum", "1.0f"),
    Fault("what lies behind a row counts", FILE, "total += first_of(values, n);", "total += values;"),
    Fault("the largest of the whole vectors alone", FILE,
          "largest[k] = values[k] > largest[k] ? values[k] : largest[k];", "(void)k;"),
    Fault("the first head's keys for all", FILE, "(which * heads + head % heads) * width", "which * heads * width"),
    Fault("the next head's tokens", FILE, "head % heads * width", "0"),
    Fault("a tile's rows written one late", FILE, "tokens.row(first + i)",
          "tokens.row(first + (i + 1 < rows ? i + 1 : i))"),
    Fault("sums that start anew in each chain", FILE, "s > 0", "false"),
    Fault("the last columns by the first register", FILE, "columns - column > LANES ? whole : narrow", "narrow"),
    Fault("gradients of scores without their mean", FILE, "sum(weighted) / sum(weights)", "0.0f"),
    Fault("gradients of scores without the scale", FILE, "(load(grads + i) - mean) * scale",
          "(load(grads + i) - mean)"),
    Fault("the mean of more than the row", FILE, "weights += first_of(probability, n)", "weights += probability"),
    Fault("gradients of values from those of scores", FILE, "sum_columns(probabilities, of_grads, 2, first, rows);",
          "sum_columns(d_scores, of_grads, 2, first, rows);"),
    Fault("gradients of keys by the gradients", FILE, "sum_columns(d_scores, of_queries, 1, first, rows);",
          "sum_columns(d_scores, of_grads, 1, first, rows);"),
    Fault("sums of the first image alone", FILE, "image < images", "image < 1"),
    Fault("sums of a tile's first row", FILE, "load(from + i * op.columns + k)", "load(from + k)"),
    Fault("the first row's sum for all of a tile", FILE, "of_row[i].logsum", "of_row[0].logsum"),
)  # fmt: skip


def test_without_a_fault_nothing_is_wrong(found: dict[str, str]) -> None:
    assert found[""] == ""


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_a_fault_is_caught(found: dict[str, str], name: str) -> None:
    assert found[name], "not caught"
