"""The stages of the campaign that measure, on a CPU and at tiny sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvit import tuning as tables
from fastvit.benchmarks import add_position, problem, sweep
from fastvit.benchmarks import tune as tuner
from fastvit.benchmarks.campaign import launch, speed
from fastvit.benchmarks.profiling import Setup
from fastvit.benchmarks.rows import Row, read_json_lines
from fastvit.benchmarks.runner import SUITES
from fastvit.validation.faults import planted
from fastvit.validation.report import FAILED, PASSED, SKIPPED
from tests.benchmarks.stage_results import last_figure, rows_in

CPU = torch.device("cpu")


# ceilings and suites


def test_rows_of_all_stages_stand_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.ceilings(tmp_path, "cpu", size=32, values=2**10, seconds=0.001) == PASSED
    assert "TFLOP/s; copy " in last_figure(capsys.readouterr().out)
    assert speed.suite(tmp_path, "add_position", "cpu", "tiny", 0.001) == PASSED
    assert speed.suite(tmp_path, "add_position", "cpu", "tiny", 0.001) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")
    assert [row.dtype for row in rows[:4]] == ["bfloat16", "float32, tf32", "float32, ieee", "float32"]
    assert all(row.op == "ceiling" and row.median_us and row.device and row.versions for row in rows[:4])
    assert all(row.flops == 2 * 32**3 for row in rows[:3]) and rows[3].moved_bytes == 8 * 2**10
    assert {row.op for row in rows[4:]} == {"add_position"} and len(rows) == 4 + 2 * len(rows[4:]) // 2
    assert rows[0].command == "make gpu STAGE=ceilings" and rows[4].command == "make gpu STAGE=add_position"
    assert "6 cases; " in last_figure(capsys.readouterr().out)
    assert torch.backends.cuda.matmul.fp32_precision not in ("tf32",)


def test_a_suite_with_wrong_results_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with planted("add_position: last column wrong"):
        assert speed.suite(tmp_path, "add_position", "cpu", "tiny", 0.001) == FAILED
    printed = capsys.readouterr().out
    assert "not timed: fastvit:cpu" in printed and last_figure(printed).endswith("6 not timed")


def test_compiled_rivals_have_a_stage_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The suite alone does without them, and what it has measured is there whatever becomes of a compiler."""
    plan = {
        with_compiled: functools.partial(add_position._problems_of, "Ti", 2, patches, "float32", CPU, with_compiled)
        for patches, with_compiled in ((4, True), (9, False))
    }
    monkeypatch.setitem(SUITES, "add_position", lambda size, device: [(str(key), make) for key, make in plan.items()])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setenv(problem.NO_COMPILE, "1")
    assert speed.suite(tmp_path, "add_position", "cpu", "small", 0.001) == PASSED
    eager = read_json_lines(tmp_path / "bench.jsonl")
    left_out = [row for row in eager if row.median_us is None]
    assert len(eager) == 2 * 3 + 2 * 2 and {row.provider for row in left_out} == {"cat + add compiled"}
    assert {row.reason for row in left_out} == {problem.NOT_COMPILED}
    assert speed.compiled(tmp_path, "cpu", "small", 0.001, ["add_position"]) == SKIPPED
    assert last_figure(capsys.readouterr().out) == problem.NOT_COMPILED
    monkeypatch.delenv(problem.NO_COMPILE)
    assert speed.compiled(tmp_path, "cpu", "small", 0.001, ["add_position"]) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")[len(eager) :]
    assert len(rows) == 2 * 3 and all(row.median_us and "4 patches" in row.shape for row in rows)
    assert {row.command for row in rows} == {"make gpu STAGE=compiled"}
    assert set(speed.WITH_COMPILED) < set(SUITES)


def test_the_headline_names_the_worst_case() -> None:
    case = ("patch_embed", "ViT-S", "float32", "NCHW")
    rows = [
        Row(*case, "fastvit:triton", "forward", 10.0, headline=1.5, best_rival="timm compiled"),
        Row(*case, "timm compiled", "forward", 15.0, rival="timm"),
        Row(*case, "fastvit:triton", "training step", 10.0, headline=0.9, best_rival="linear"),
        Row(*case, "fastvit:triton", "training step, cuda graph", reason="can't be captured"),
    ]
    found = speed.headline(rows)
    worst = "worst: linear, ViT-S, float32, training step"
    assert found == f"3 cases; 0.90x to 1.50x the best rival; {worst}"
    rows.append(Row(*case, "fastvit:cuda", "forward", 20.0, headline=0.75, best_rival="timm compiled"))
    found = speed.headline(rows)
    assert found == f"3 cases; 0.90x to 1.50x the best rival; {worst}; fastest of ours: triton 2", "the faster of ours"
    rows.append(Row(*case, "fastvit:cuda", "training step", 8.0, headline=1.1, best_rival="linear"))
    assert speed.headline(rows).endswith("1.10x to 1.50x the best rival; worst: linear, ViT-S, float32, training step; "
                                   "fastest of ours: triton 1, cuda 1")  # fmt: skip
    # Judged by graphs, where there are any: one by one, launches wait for the host.
    graphs = [replace(row, mode=row.mode + problem.GRAPH, headline=2.0) for row in rows if row.headline == 1.5]
    assert speed.headline([*rows, *graphs]).startswith(
        "4 cases; 2.00x to 2.00x the best rival; worst: timm compiled, ViT-S, float32, forward, cuda graph"
    )
    assert not speed.not_timed(rows), "a call that can't be captured is no failure"
    assert not speed.not_timed([replace(rows[0], median_us=None, reason=problem.NOT_COMPILED)])
    assert speed.headline([]) == "0 cases"
    assert speed.headline([Row(*case, "fastvit:triton", "forward", reason="wrong")]) == "1 case; 1 not timed"


# sweep, tune and profile


def test_the_sweep_keeps_what_comes_and_fails_where_a_variant_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = Row("sweep", "", "bfloat16", "", "large", "forward")
    rows = [replace(blank, median_us=2.0), replace(blank, reason=sweep.NOT_REACHED)]
    asked: list[dict[str, object]] = []

    def run(device: str, on_rows: Callable[[list[Row]], None], **given: object) -> list[Row]:
        asked.append(given)
        for row in rows:
            on_rows([row])
        return rows

    monkeypatch.setattr(sweep, "sweep", run)
    for reason, status in (("", PASSED), (sweep.NOT_TIMED, PASSED), ("out of tolerance", FAILED)):
        rows[-1] = replace(rows[-1], reason=reason)
        assert speed.sweep(tmp_path, "cpu", batch=2) == status
        printed = capsys.readouterr().out
        assert "\n".join(sweep.format_lines(rows)) in printed
        assert last_figure(printed) == f"1 timed, {int(status == FAILED)} wrong or not launched, of 2"
    assert asked == [{"batch": 2, "command": "make gpu STAGE=sweep"}] * 3
    assert len(read_json_lines(tmp_path / "bench.jsonl")) == 6


def test_the_table_is_written_batch_by_batch_and_model_by_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, str]] = []
    choice = tables.Choice("cpu", {"reference": 2.0, "cpu": 1.0}, excluded={"triton": "wrong"})

    def measure(device: str, models: list[str], scope: tuner.Scope, progress: object) -> tables.Table:
        if asked:
            assert len(tables.Table.load(tmp_path / "tuning.json").choices) == min(len(asked), 2)
        (model,), (batch,) = models, scope.batches
        asked.append((batch, model))
        problem = tables.Problem("add_position", "forward", *[torch.float32] * 3, (tuner.WIDTHS[model],), False)
        return tables.Table("a GPU", {"torch": "2"}, {problem: {tables.bucket(batch * 196): choice}})

    monkeypatch.setattr(tuner, "tune", measure)
    assert speed.tune(tmp_path, "cuda") == PASSED
    assert asked == [(256, "S"), (256, "B"), (8, "S"), (8, "B")]
    table = tables.Table.load(tmp_path / "tuning.json")
    assert [sorted(measured) for measured in table.choices.values()] == [[2**11, 2**16]] * 2
    assert last_figure(capsys.readouterr().out) == "4 choices: cpu 4; 4 candidates excluded"
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_profiles_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that fails keeps nobody from running, and one that was to be compiled can be skipped."""
    monkeypatch.setenv(problem.NO_COMPILE, "1")
    good, bad, compiled = Setup("Ti", 1), Setup("Ti", 1, provider="nobody"), Setup("Ti", 1, compiled=True)
    assert speed.profiles(tmp_path, "cpu", [compiled, good], depth=1) == PASSED
    printed = capsys.readouterr().out
    assert last_figure(printed).startswith("Ti fastvit: ")
    assert f"{compiled}: skipped: {problem.NOT_COMPILED}" in printed
    assert speed.profiles(tmp_path, "cpu", [bad, good], depth=1) == FAILED
    assert last_figure(capsys.readouterr().out).startswith("1 failed; Ti fastvit: ")
    rows = rows_in(tmp_path / "profile.jsonl")
    assert {row["model"] for row in rows} == {"Ti"} and sum(row["share"] for row in rows) == pytest.approx(2, abs=0.01)


def test_every_backend_that_runs_is_profiled_eager_ones_first(
    gpu_backends: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Setup] = []

    def note(setup: Setup, device: str) -> None:
        asked.append(setup)
        raise problem.NotCompiled("nor profiled")

    monkeypatch.setattr(speed, "profile", note)
    assert speed.profiles(tmp_path, "cpu") == FAILED, "nothing was"
    eager = [f"fastvit:{name}" for name in ("cpu", *gpu_backends)]
    assert [(setup.compiled, setup.model, setup.provider) for setup in asked] == [
        (compiled, model, provider)
        for compiled, providers in ((False, [*eager, "timm"]), (True, ["fastvit", "timm"]))
        for model in "SB"
        for provider in providers
    ]


# launch


def test_calls_are_timed_beside_torchs_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(tmp_path, "cpu", rounds=2) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")
    assert len(rows) == 2 * 2 * 2 and len({row.case for row in rows}) == 4
    assert all(row.median_us and row.repeats == 2 and row.device and row.versions for row in rows)
    assert {row.command for row in rows} == {"make gpu STAGE=launch"}
    times = {(row.shape, row.mode, row.provider): row.median_us or 0.0 for row in rows}
    for shape, mode, provider in times:
        if provider == "fastvit:cpu":
            assert times[shape, mode, provider] > 1, "microseconds: that of a call, and not of nothing"
    printed = capsys.readouterr().out
    assert "torch.add" in printed and "not timed" not in printed
    assert last_figure(printed).startswith("patch_embed: cpu ") and "add_position: cpu" in last_figure(printed)


def test_a_wrong_backend_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with planted("add_position: last column wrong"):
        assert launch.launch(tmp_path, "cpu", rounds=1) == FAILED
    wrong = [row for row in read_json_lines(tmp_path / "bench.jsonl") if "out of tolerance" in row.reason]
    assert {(row.provider, row.shape.split(",")[0]) for row in wrong} == {("fastvit:cpu", "add_position")}
    assert "not timed: fastvit:cpu" in capsys.readouterr().out


def test_without_any_kernel_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backends_of", lambda device: [])
    assert launch.launch(tmp_path, "cpu", rounds=1) == FAILED
