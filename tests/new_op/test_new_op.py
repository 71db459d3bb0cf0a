"""An op is declared once a layer, in a file of its name: a toy one, put into the folders and taken out again.

The files beside this one are all that the layers are given; what a user calls and what defines it are here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backend as backends
from fastvit import functional, reference, tuning
from fastvit.benchmarks import timing
from fastvit.benchmarks.contenders import check_backend
from fastvit.benchmarks.runner import SUITES, run_suites
from fastvit.benchmarks.tune import TUNED, Scope, tune
from fastvit.emulated import build
from fastvit.validation import cases_for, validate, validate_function
from fastvit.validation.faults import faults, planted
from fastvit.validation.ops import OPS

NAME = "scaled_add"
FOLDERS = {
    "cpu": "fastvit.cpu",
    "kernels": "fastvit.kernels",
    "validation": "fastvit.validation.ops",
    "benchmarks": "fastvit.benchmarks",
}


class _ScaledAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, factor: float, backend: str) -> tuple[Tensor, Tensor]:
        ctx.rest = factor, backend
        backends.count_launch(NAME, backend)
        return backends.implementation(backend, NAME)[0](a, b, factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor, backend = ctx.rest
        backends.count_launch(f"{NAME}_backward", backend)
        return *backends.implementation(backend, NAME)[1](*grads, factor), None, None


def _by_definition(a: Tensor, b: Tensor, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    return a + factor * b, a - factor * b


def _scaled_add(a: Tensor, b: Tensor, *, factor: float = 1.0, backend: str | None = None) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return _by_definition(a, b, factor=factor)
    return _ScaledAdd.apply(a, b, factor, backend or "cpu")


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The toy op, known for the length of a test."""
    monkeypatch.setattr(functional, NAME, _scaled_add, raising=False)
    monkeypatch.setattr(reference, NAME, _by_definition, raising=False)
    for folder, package in FOLDERS.items():
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(Path(__file__).with_name(folder))])
    yield NAME
    backends.implementation.cache_clear()
    backends._is_module.cache_clear()
    for package in FOLDERS.values():
        sys.modules.pop(f"{package}.{NAME}", None)
        vars(sys.modules[package]).pop(NAME, None)


def test_the_validator_holds_it_to_its_reference(op: str) -> None:
    report = validate(backends=["cpu"], ops=[op])
    assert report.ok and {row.case for row in report.rows} == {"plain", "turned, width 63", "large"}
    assert {row.quantity for row in report.rows} == {"forward", "difference", "d_a", "d_b", "repeat"}
    assert op in OPS and [case.name for case in cases_for(op, large=False, quick=True)] == ["plain"]
    one_result = validate_function(lambda a, b, factor: a + factor * b, op=op, dtypes=["fp32"], quick=True)
    assert {row.reason for row in one_result.failures} == {"ValueError: 1 results, expected forward, difference"}


def test_its_planted_faults_are_caught_where_they_are(op: str) -> None:
    mine = {name: fault for name, (of, fault) in faults().items() if of == op}
    assert len(mine) == 2
    for name, fault in mine.items():
        with planted(name):
            failures = validate(backends=["cpu"], ops=[op]).failures
        assert {row.quantity for row in failures} == {fault.spoils}


def test_a_backend_without_a_file_of_its_name_has_no_part_in_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = f"it has no kernel for {op}"
    rows = validate(backends=["emulated"], ops=[op], device="cpu").rows
    assert {row.status for row in rows} == {"skipped"} and rows[0].reason in (missing, build.why_unavailable())
    monkeypatch.setattr(backends, "why_unavailable", lambda name, device_type: "")
    with pytest.raises(RuntimeError, match=f"backend: 'cuda' can't run on device 'cuda': {missing}"):
        backends.resolve("cuda", "cuda", False, op)
    assert backends._automatic("cuda", op, "") == "triton"
    assert backends._automatic("cuda", "add_position", "") == "cuda"
    measured = tuning.Choice("cuda", {"cuda": 1.0, "triton": 2.0, "reference": 3.0})
    assert backends._usable(measured, torch.device("cuda"), op) == "triton"
    assert check_backend("cuda", op, None, torch.device("cuda")) == missing  # type: ignore[arg-type]


def test_its_specialisations_are_in_the_manifest_and_compile(op: str) -> None:
    pytest.importorskip("triton")
    from fastvit.kernels import manifest
    from fastvit.kernels.compile_check import inspect

    entries = [entry for entry in manifest.entries() if entry.kernel == op]
    assert [entry.name for entry in entries] == ["scaled_add fp32", "scaled_add bf16", "scaled_add fp16"]
    if backends.triton_is_interpreted():
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled with it")
    row = inspect(entries[1], 90)
    assert row.problems == () and row.copies == {"a": "ld 16", "b": "ld 16"}


def test_suites_and_tuner_measure_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setitem(backends._REASONS, "native", lambda device_type: "it has no such op")
    rows = run_suites([op], "tiny", "cpu", threads=1)
    assert {(row.provider, row.mode) for row in rows if row.median_us} == {
        (provider, mode) for provider in ("fastvit:cpu", "torch.add") for mode in ("forward", "forward+backward")
    }
    table = tune("cpu", ("Ti",), scope=Scope((1,), ("float32",), 0.01), threads=1, backends=["cpu"], image=32)
    mine = {problem.mode: choices for problem, choices in table.choices.items() if problem.op == op}
    assert set(mine) == {tuning.FORWARD, tuning.TRAINING}
    with planted("scaled_add: difference wrong"):
        assert all("out of tolerance" in row.reason for row in run_suites([op], "tiny", "cpu") if row.is_ours)


def test_it_leaves_no_trace() -> None:
    for known in (OPS, SUITES, TUNED, {of: fault for of, fault in faults().values()}):
        assert set(known) >= {"add_position", "patch_embed"} and NAME not in known
    assert not [name for name in sys.modules if name.endswith(f".{NAME}") and name.startswith("fastvit")]
    with pytest.raises(ValueError, match=f"unknown op '{NAME}'; known: .*add_position.*patch_embed"):
        validate(backends=["cpu"], ops=[NAME])
