"""bias_act and split_heads in the suites and in the tuner, whose tables their calls look up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvit import functional, tuning
from fastvit.benchmarks import timing, tune
from fastvit.benchmarks.runner import run_suites
from fastvit.tuning import FORWARD, TRAINING
from fastvit.validation.faults import planted

MODES = {"bias_act": {FORWARD, TRAINING}, "split_heads": {TRAINING}}
FAULTS = {"bias_act": "bias_act: last column wrong", "split_heads": "split_heads: keys and values swapped"}


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)


@pytest.mark.parametrize("op", MODES)
def test_suites_measure_them(op: str) -> None:
    rows = run_suites([op], "tiny", "cpu", threads=1)
    assert any(row.is_ours for row in rows) and all(row.median_us for row in rows), rows
    assert all(row.headline and row.floor_share for row in rows if row.is_ours), rows
    with planted(FAULTS[op]):
        assert all("out of tolerance" in row.reason for row in run_suites([op], "tiny", "cpu") if row.is_ours)


@pytest.mark.parametrize("op", MODES)
def test_calls_follow_what_was_measured(
    op: str, use: Callable[[tuning.Table], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "TUNED", {op: tune.TUNED[op]})
    scope = tune.Scope((2,), ("float32", "bfloat16"), 0.01)
    with tune.steady(torch.device("cpu"), 1):
        measured = tune.tune("cpu", ("Ti",), scope=scope, threads=1, backends=["cpu"], image=32)
        assert {problem.mode for problem in measured.choices} == MODES[op]
        choice = tuning.Choice("reference", {"reference": 1.0, "cpu": 2.0})
        choices = {problem: dict.fromkeys(rows, choice) for problem, rows in measured.choices.items()}
        use(tuning.Table(measured.device, measured.versions, choices))
        for problem, rows in choices.items():
            seen: list[tuple[object, int]] = []
            with monkeypatch.context() as spied:
                spied.setattr(tuning, "find", lambda *a, find=tuning.find, seen=seen: (seen.append(a[1:]), find(*a))[1])
                call(problem)
            assert [(asked, tuning.bucket(number) in rows) for asked, number in seen] == [(problem, True)]


def call(problem: tuning.Problem) -> None:
    """As a user would make it."""
    training = problem.mode == TRAINING
    vector = torch.randn(problem.shape, dtype=problem.compute, requires_grad=training)
    x = torch.randn(2, 5, problem.shape[0]).to(problem.image)
    with torch.set_grad_enabled(training):
        if problem.op == "split_heads":
            functional.split_heads(x, vector, 3)
        elif problem.keep:
            functional.bias_act(x, vector, "silu", gate_last=False)
        else:
            functional.bias_act(x, vector)
