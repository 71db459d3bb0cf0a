"""The suites measure the backend beside the other one, and leave out what is wrong of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvit.benchmarks import timing
from fastvit.benchmarks.runner import run_suites
from fastvit.validation.faults import planted


def test_it_is_measured_beside_pytorch(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    rows = [row for row in run_suites(["add_position"], "tiny", "cpu", threads=1) if row.is_ours]
    assert {row.provider for row in rows} == {"fastvit:cpu", "fastvit:native"} and all(row.median_us for row in rows)
    with planted("add_position: last column wrong", backend="native"):
        rows = [row for row in run_suites(["add_position"], "tiny", "cpu", threads=1) if row.is_ours]
    assert {row.provider: "out of tolerance" in row.reason for row in rows} == {
        "fastvit:cpu": False, "fastvit:native": True
    }  # fmt: skip
