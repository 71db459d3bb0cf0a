"""Comparing two files of rows: what counts as slower, what is a regression, and what is said about the machines."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from fastvit.benchmarks.compare import Change, Comparison, compare, format_comparison
from fastvit.benchmarks.rows import Row

Times = tuple[float, float, float]  # median, p20, p80
BASE = Row(
    "patch_embed", "ViT-S, batch 4", "float32", "NCHW", "fastvit:cpu", "forward", 100.0, 98.0, 102.0,
    device="Some CPU, 2 threads", versions={"torch": "2.13.0", "timm": "1.0"}, commit="a",
)  # fmt: skip
MISSING = replace(BASE, median_us=None, p20_us=None, p80_us=None, reason="out of tolerance: [row 7]")


def timed(times: Times, **changes: Any) -> Row:
    median, low, high = times
    return replace(BASE, median_us=median, p20_us=low, p80_us=high, **changes)


def text_of(comparison: Comparison) -> str:
    console = Console(width=200, record=True)
    console.print(format_comparison(comparison))
    return console.export_text()


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((100, 98, 102), (110, 108, 112), "slower"),
        ((100, 98, 102), (110, 101, 119), "unchanged"),  # the spreads overlap
        ((100, 98, 102), (110, 102, 119), "unchanged"),  # and here they touch
        ((100, 99.5, 100.5), (102.5, 102, 103), "unchanged"),  # apart, but hardly
        ((100, 98, 102), (90, 88, 92), "faster"),
        ((100, 98, 102), (90, 80, 99), "unchanged"),
        ((100, 99.5, 100.5), (97.5, 97, 98), "unchanged"),
    ],
)
def test_a_change_counts_if_the_spreads_are_apart_and_it_is_not_tiny(before: Times, after: Times, verdict: str) -> None:
    change = Change(timed(before), timed(after))
    assert change.verdict == verdict and change.is_regression == (verdict == "slower")
    assert change.change == pytest.approx(after[0] / before[0] - 1)


def test_what_no_longer_runs_is_a_regression_of_ours_alone() -> None:
    assert Change(BASE, MISSING).verdict == "stopped running" and Change(BASE, MISSING).is_regression
    assert Change(MISSING, BASE).verdict == "runs now" and not Change(MISSING, BASE).is_regression
    assert Change(MISSING, MISSING).verdict == "never ran" and Change(MISSING, MISSING).change is None
    rival = {"provider": "timm", "rival": "timm"}
    assert not Change(replace(BASE, **rival), replace(MISSING, **rival)).is_regression
    assert not Change(timed((100, 98, 102), **rival), timed((200, 198, 202), **rival)).is_regression


def test_rows_are_matched_by_case_and_provider_and_the_last_of_equals_counts() -> None:
    other = replace(BASE, mode="forward+backward")
    compiled = replace(BASE, provider="timm compiled", rival="timm")
    found = compare([BASE, other], [timed((50, 49, 51)), compiled, timed((101, 99, 103))])
    assert [(change.before, change.verdict) for change in found.changes] == [(BASE, "unchanged")]
    assert list(found.only_before) == [other] and list(found.only_after) == [compiled]
    assert "only before: patch_embed, ViT-S, batch 4, float32, NCHW, forward+backward: fastvit:cpu" in text_of(found)
    assert "forward: timm compiled" in text_of(found)
    with pytest.raises(ValueError, match="no case and provider is in both"):
        compare([BASE], [other])


def test_the_table_has_regressions_first_and_rivals_apart() -> None:
    shapes = {"same": (100, 98, 102), "bad": (150, 149, 151), "worse": (300, 299, 301), "good": (50, 49, 51)}
    before = [replace(BASE, shape=name) for name in (*shapes, "gone")]
    after = [timed(times, shape=name) for name, times in shapes.items()] + [replace(MISSING, shape="gone")]
    rivals = [timed((100, 98, 102), provider=name, rival=name) for name in ("steady rival", "moved rival")]
    moved = [rivals[0], timed((200, 198, 202), provider="moved rival", rival="moved rival")]
    found = compare([*rivals, *before], [*moved, *after])
    text = text_of(found)
    places = [text.index(f"patch_embed, {name} ") for name in ("gone", "worse", "bad", "good", "same")]
    assert places == sorted(places) and places[-1] < text.index("rivals that moved") < text.index("moved rival")
    assert "steady rival" not in text and "out of tolerance: [row 7]" in text and "+50.0%" in text
    assert "300.0 µs (299.0..301.0)" in text
    assert "ours: 1 stopped running, 2 slower, 1 faster, 1 unchanged" in text
    assert [change.before.shape for change in found.regressions] == ["bad", "worse", "gone"]


def test_differences_of_the_machines_stand_above() -> None:
    after = replace(BASE, device="Some CPU, 4 threads", versions={"torch": "2.14.0", "timm": "", "driver": "9"})
    found = compare([BASE], [after])
    assert list(found.differences) == [
        "threads: 2 before, 4 after",
        "torch: 2.13.0 before, 2.14.0 after",
        "timm: 1.0 before, none after",
        "driver: not recorded before, 9 after",
    ]
    assert text_of(found).index("threads: 2 before, 4 after") < text_of(found).index("ours")
    assert list(compare([BASE], [replace(BASE, device="A GPU")]).differences) == [
        "device: Some CPU before, A GPU after",
        "threads: 2 before, not recorded after",
    ]
    assert not compare([BASE], [replace(BASE, commit="b")]).differences
    assert "differ in more than the code" not in text_of(compare([BASE], [BASE]))


def test_a_change_as_json() -> None:
    found = json.loads(Change(BASE, timed((110, 108, 112))).to_json())
    assert found["verdict"] == "slower" and found["regression"] and found["change"] == pytest.approx(0.1)
    assert found["provider"] == "fastvit:cpu" and found["before"]["p80_us"] == 102.0
    assert json.loads(Change(BASE, MISSING).to_json())["reason"] == "out of tolerance: [row 7]"
