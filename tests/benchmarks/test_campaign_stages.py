"""What the stages of the campaign do, on a CPU and at tiny sizes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvit import tuning as tables
from fastvit.benchmarks import add_position, problem, timing
from fastvit.benchmarks import tune as tuner
from fastvit.benchmarks.campaign import profiles, tuning
from fastvit.benchmarks.campaign.ceilings import ceilings
from fastvit.benchmarks.campaign.output import FAILED, PASSED, SKIPPED, understood
from fastvit.benchmarks.campaign.suites import WITH_COMPILED, compiled, headline, not_timed, suite
from fastvit.benchmarks.profiling import Setup
from fastvit.benchmarks.rows import Row, read_json_lines
from fastvit.benchmarks.runner import SUITES
from fastvit.kernels import launch, manifest
from fastvit.validation.faults import planted
from tests.benchmarks.stage_results import last_figure, rows_in

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
BF16 = ("bfloat16",)
CPU = torch.device("cpu")


# warm


@without_gpu
def test_warming_compiles_what_a_launch_would_look_for(tmp_path: Path) -> None:
    """With a driver that only names its GPU, an entry compiles along the path of a launch."""
    pytest.importorskip("triton")
    code = """
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
driver.set_active(Driver())
from fastvit.benchmarks.campaign.warm import warm_entry
from fastvit.kernels import manifest
for kernel in ("add_position", "sum_rows"):
    entry = next(entry for entry in manifest.entries() if entry.kernel == kernel)
    assert warm_entry(entry).asm["cubin"]
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@without_gpu
def test_a_kernel_that_does_not_compile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a driver none compiles."""
    from fastvit.benchmarks.campaign import warm

    pytest.importorskip("triton")
    monkeypatch.setattr(warm, "PROCESSES", 1)
    first = manifest.entries()[:1]
    monkeypatch.setattr(manifest, "entries", lambda: first)
    assert warm.warm(tmp_path) == FAILED
    printed = capsys.readouterr().out
    assert last_figure(printed) == "0 of 1 kernels compiled" and f"\n{first[0].name}: " in printed


def test_what_is_compiled_is_loaded_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pool of one, in this process, and a kernel of which Triton says what it takes once it is loaded."""
    from concurrent.futures import ThreadPoolExecutor

    from fastvit.benchmarks.campaign import warm

    pytest.importorskip("triton")

    class Kernel:
        def _init_handles(self) -> None:
            if not fits:
                raise RuntimeError("out of resource: shared memory")
            self.n_regs, self.n_spills = 168, 4

    entries = manifest.entries()[:1]
    function = SimpleNamespace(params=[], warmup=lambda **_: Kernel())
    monkeypatch.setattr(manifest, "entries", lambda: entries)
    monkeypatch.setattr(launch, "jit_function", lambda entry: function)
    monkeypatch.setattr(warm, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    for has_gpu, fits, status in ((False, True, PASSED), (True, True, PASSED), (True, False, FAILED)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert warm.warm(tmp_path) == status
        (row,) = [
            found for line in capsys.readouterr().out.splitlines() if (found := understood(line)) and "kernel" in found
        ]
        assert row["kernel"] == entries[0].name and ("shared memory" in str(row.get("error"))) == (not fits)
        assert (row.get("n_regs"), row.get("n_spills")) == ((168, 4) if has_gpu and fits else (None, None))


# ceilings and suites


def test_rows_of_all_stages_stand_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ceilings(tmp_path, "cpu", size=32, values=2**10, seconds=0.001) == PASSED
    assert "TFLOP/s; copy " in last_figure(capsys.readouterr().out)
    assert suite("add_position", tmp_path, "cpu", "tiny", 0.001) == PASSED
    assert suite("add_position", tmp_path, "cpu", "tiny", 0.001) == PASSED
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
        assert suite("add_position", tmp_path, "cpu", "tiny", 0.001) == FAILED
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
    assert suite("add_position", tmp_path, "cpu", "small", 0.001) == PASSED
    eager = read_json_lines(tmp_path / "bench.jsonl")
    left_out = [row for row in eager if row.median_us is None]
    assert len(eager) == 2 * 3 + 2 * 2 and {row.provider for row in left_out} == {"cat + add compiled"}
    assert {row.reason for row in left_out} == {problem.NOT_COMPILED}
    assert compiled(tmp_path, "cpu", "small", 0.001, ["add_position"]) == SKIPPED
    assert last_figure(capsys.readouterr().out) == problem.NOT_COMPILED
    monkeypatch.delenv(problem.NO_COMPILE)
    assert compiled(tmp_path, "cpu", "small", 0.001, ["add_position"]) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")[len(eager) :]
    assert len(rows) == 2 * 3 and all(row.median_us and "4 patches" in row.shape for row in rows)
    assert {row.command for row in rows} == {"make gpu STAGE=compiled"}
    assert set(WITH_COMPILED) < set(SUITES)


def test_ours_that_was_not_to_be_compiled_is_no_failure() -> None:
    row = Row("model", "ViT-S", "float32", "NCHW", "fastvit:triton compiled", "training step")
    assert not_timed([row, replace(row, reason=problem.NOT_COMPILED)]) == [row]


def test_float32_ceilings_are_those_of_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch makes in TF32 unless it is told not to, and matrix products not."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, seen = convolution.fp32_precision, []

    def timed(calls: list[object], *_: object) -> list[timing.Timing]:
        seen.append(matmul.fp32_precision)
        return [timing.Timing(1.0, 1.0, 1.0, 1)] * len(calls)

    monkeypatch.setattr(timing, "interleave", timed)
    try:
        for precision in ("tf32", "ieee"):
            convolution.fp32_precision = precision
            timing.ceilings.__wrapped__(CPU, torch.float32)
            assert seen.pop() == precision and matmul.fp32_precision == "none"
    finally:
        convolution.fp32_precision = before


def test_an_unknown_suite_fails_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown suite 'speed'"):
        suite("speed", tmp_path, "cpu", "tiny")


def test_the_headline_names_the_worst_case() -> None:
    case = ("patch_embed", "ViT-S", "float32", "NCHW")
    rows = [
        Row(*case, "fastvit:triton", "forward", 10.0, headline=1.5, best_rival="timm compiled"),
        Row(*case, "timm compiled", "forward", 15.0, rival="timm"),
        Row(*case, "fastvit:triton", "training step", 10.0, headline=0.9, best_rival="linear"),
        Row(*case, "fastvit:triton", "training step, cuda graph", reason="can't be captured"),
    ]
    found = headline(rows)
    worst = "worst: linear, ViT-S, float32, training step"
    assert found == f"3 cases; 0.90x to 1.50x the best rival; {worst}"
    rows.append(Row(*case, "fastvit:cuda", "forward", 20.0, headline=0.75, best_rival="timm compiled"))
    found = headline(rows)
    assert found == f"3 cases; 0.90x to 1.50x the best rival; {worst}; fastest of ours: triton 2", "the faster of ours"
    rows.append(Row(*case, "fastvit:cuda", "training step", 8.0, headline=1.1, best_rival="linear"))
    assert headline(rows).endswith("1.10x to 1.50x the best rival; worst: linear, ViT-S, float32, training step; "
                                   "fastest of ours: triton 1, cuda 1")  # fmt: skip
    assert not not_timed(rows), "a call that can't be captured is no failure"
    assert headline([]) == "0 cases"
    assert headline([Row(*case, "fastvit:triton", "forward", reason="wrong")]) == "1 case; 1 not timed"


# tune and profile


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
    assert tuning.tune(tmp_path, "cuda") == PASSED
    assert asked == [(256, "S"), (256, "B"), (8, "S"), (8, "B")]
    table = tables.Table.load(tmp_path / "tuning.json")
    assert [sorted(measured) for measured in table.choices.values()] == [[2**11, 2**16]] * 2
    assert last_figure(capsys.readouterr().out) == "4 choices: cpu 4; 4 candidates excluded"
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_tables_of_single_batches_make_up_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the measuring itself, at a size of no importance."""
    scope = tuner.Scope((1, 4), ("float32",), 0.001)
    monkeypatch.setattr(tuner, "scope_of", lambda device, quick: scope)
    monkeypatch.setattr(tuner, "tune", functools.partial(tuner.tune, image=32, threads=1))
    assert tuning.tune(tmp_path, "cpu", ["Ti"]) == PASSED
    table, whole = tables.Table.load(tmp_path / "tuning.json"), tuner.tune("cpu", ["Ti"], scope=scope)
    assert {problem: set(found) for problem, found in table.choices.items()} == {
        problem: set(found) for problem, found in whole.choices.items()
    }
    assert all(len(found) == 2 for found in table.choices.values()) and len(table.choices) == 4


def test_profiles_are_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Setup("Ti", 1), Setup("Ti", 1, provider="nobody")
    assert profiles.profiles(tmp_path, "cpu", [good], depth=1) == PASSED
    assert last_figure(capsys.readouterr().out).startswith("Ti fastvit: ")
    assert profiles.profiles(tmp_path, "cpu", [bad, good], depth=1) == FAILED
    assert last_figure(capsys.readouterr().out).startswith("1 failed; Ti fastvit: ")
    rows = rows_in(tmp_path / "profile.jsonl")
    assert {row["model"] for row in rows} == {"Ti"} and sum(float(str(row["share"])) for row in rows) == pytest.approx(
        2.0, abs=0.01
    )


def test_a_profile_that_was_to_be_compiled_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(problem.NO_COMPILE, "1")
    setups = [Setup("Ti", 1), Setup("Ti", 1, compiled=True)]
    assert profiles.profiles(tmp_path, "cpu", setups, depth=1) == PASSED
    assert f"{setups[1]}: skipped: {problem.NOT_COMPILED}" in capsys.readouterr().out


def test_eager_profiles_come_first() -> None:
    setups = profiles.plan(["triton", "cuda"])
    assert [setup.compiled for setup in setups] == [False] * 6 + [True] * 4
    for is_compiled, ours in ((False, ["fastvit:triton", "fastvit:cuda"]), (True, ["fastvit"])):
        asked = {(setup.model, setup.provider) for setup in setups if setup.compiled == is_compiled}
        assert asked == {(model, provider) for model in "SB" for provider in (*ours, "timm")}


def test_every_backend_that_runs_is_profiled(
    gpu_backends: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "MODELS", ("Ti",))
    monkeypatch.setattr(profiles, "BATCH", 1)
    real = profiles.plan
    monkeypatch.setattr(profiles, "plan", lambda names: [setup for setup in real(names) if not setup.compiled])
    profiles.profiles(tmp_path, "cpu", depth=1)
    providers = {row["provider"] for row in rows_in(tmp_path / "profile.jsonl")}
    assert providers - {"timm"} == {f"fastvit:{name}" for name in ("cpu", *gpu_backends)}
