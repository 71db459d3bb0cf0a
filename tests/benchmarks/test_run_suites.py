"""The suites run, check before they time, and give a reason for what did not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvit import peers
from fastvit.backend import BACKENDS
from fastvit.benchmarks import model, problem, runner
from fastvit.benchmarks.problem import COMPILED, FORWARD, STEP
from fastvit.benchmarks.rows import OURS, Row
from fastvit.benchmarks.runner import SUITES, run_suites
from fastvit.validation.faults import planted

SUITE_FILE = Path(runner.__file__).with_name("test_suites.py")


def test_every_suite_runs_and_its_rows_stand_alone() -> None:
    seen: list[tuple[int, int]] = []
    parts: list[Row] = []
    rows = run_suites(
        None, "tiny", "cpu", lambda done, total, _: seen.append((done, total)), on_rows=parts.extend, threads=1
    )
    assert rows == parts and seen[-1][0] == seen[-1][1] == len(seen) - 1
    assert {row.op for row in rows} == set(SUITES)
    for row in rows:
        assert row.device and row.versions["torch"] and row.command
        is_missing = "can't be imported" in row.reason and _missing(row)
        assert is_missing or (row.median_us and row.repeats >= 7 and row.p20_us and row.p80_us), row
    for row in rows:
        if row.provider.startswith(OURS) and row.median_us:
            timed = [(r.rival, r.provider, r.median_us) for r in rows if r.case == row.case and r.rival and r.median_us]
            assert set(row.ratios) == {rival for rival, _, _ in timed}
            for name, ratio in row.ratios.items():
                best = min(median for rival, _, median in timed if rival == name)
                assert ratio == pytest.approx(best / row.median_us, rel=1e-3, abs=6e-5)  # it has four digits
            assert row.headline and row.best_rival in {provider for _, provider, _ in timed}
    embed = [row for row in rows if row.op == "patch_embed"]
    libraries = {"timm", "timm channels_last", "torchvision", "huggingface"}
    plain = {"conv2d", "conv2d channels_last", "rearrange + linear", "linear alone"}
    assert {row.provider for row in embed} == {"fastvit:cpu", *libraries, *plain}
    assert all(row.floor_share and row.flops and row.ceilings for row in embed if row.median_us)
    assert "linear alone" not in {row.best_rival for row in rows}, "a yardstick is no rival"
    assert {row.rival for row in rows if row.op == "model"} == {"", "timm", "torchvision", "huggingface"}


def test_every_backend_of_a_gpu_is_a_contender_of_every_suite(gpu_backends: tuple[str, ...]) -> None:
    rows = run_suites(size="tiny", device="cpu", threads=1)
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case and row.is_ours]
        assert {row.provider for row in mine} == {f"{OURS}{name}" for name in ("cpu", *gpu_backends)}, case
        assert all(row.median_us and row.headline for row in mine) or peers.peer_missing("timm"), mine


@pytest.mark.parametrize("missing", ["triton", "cuda", ""])
def test_backends_that_can_run_on_a_gpu_are_ours(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {**dict.fromkeys(BACKENDS, "not here"), "reference": "", "triton": "", "cuda": ""}
    asked: list[torch.device] = []

    def available(device: torch.device) -> dict[str, str]:
        asked.append(device)
        return {**reasons, missing: "not here"}

    monkeypatch.setattr(problem, "available_backends", available)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.device("cuda", 1)
    assert problem.our_backends(gpu) == [name for name in ("triton", "cuda") if name != missing]
    assert asked == [gpu]


def test_a_backend_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "available_backends", lambda device: dict.fromkeys(BACKENDS, ""))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    all_of_them = ["cpu", "native", "triton", "cuda"]
    for names, left_out in (("", []), ("triton", ["triton"]), (" cuda ,cpu,", ["cuda", "cpu"])):
        expected = [name for name in all_of_them if name not in left_out]
        monkeypatch.setenv("FASTVIT_WITHOUT", names)
        assert [b for b in problem.our_backends(torch.device("cuda")) if b != "emulated"] == expected
    monkeypatch.setenv("FASTVIT_WITHOUT", "trition")
    with pytest.raises(
        ValueError, match="FASTVIT_WITHOUT: unknown backend 'trition'; known: reference, cpu, native, triton"
    ):
        problem.our_backends(torch.device("cuda"))


def test_a_run_can_do_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> int:
        return 3

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert problem.compiled(run, torch.device("cpu"))() == 3
    monkeypatch.setenv("FASTVIT_NO_COMPILE", "1")
    with pytest.raises(problem.Unavailable, match="not compiled in this run: FASTVIT_NO_COMPILE is set"):
        problem.compiled(run, torch.device("cpu"))


def test_what_is_emulated_or_interpreted_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = dict.fromkeys(BACKENDS, "")
    monkeypatch.setattr(problem, "available_backends", lambda device: everything)
    assert problem.our_backends(torch.device("cpu")) == ["cpu", "native", "cuda"]


def test_of_ours_one_is_compiled_where_minutes_count(gpu_backends: tuple[str, ...]) -> None:
    setup = model.Setup("Ti", 1, torch.device("cpu"), torch.float32, {"depth": 1})

    def compiled(size: str) -> dict[str, list[str]]:
        problems = model._problems_of(setup, model._compiled(size, setup))
        return {p.mode: [c.name for c in p.contenders if c.setting == COMPILED] for p in problems}

    ours = [f"{OURS}{name}" for name in problem.our_backends(setup.device)]
    assert len(ours) == 3 and compiled("small") == {FORWARD: [], STEP: [ours[0], "timm"]}
    everybody = [*ours, "timm", "torchvision", "huggingface"]
    assert compiled("full") == {FORWARD: everybody, STEP: everybody}


def _missing(row: Row) -> bool:
    """Whether the library of a rival, or the one that checks the models, is not installed here."""
    if row.op == "model" and peers.peer_missing("timm"):
        return True
    return bool(peers.peer_missing({"huggingface": "transformers"}.get(row.rival, row.rival)))


@pytest.mark.parametrize("fault", ["bias dropped", "dPos off by a batch"])
def test_a_wrong_backend_is_not_timed(fault: str) -> None:
    with planted(fault):
        rows = run_suites(["patch_embed"], "tiny", "cpu", threads=1)
    ours = [row for row in rows if row.provider == "fastvit:cpu"]
    assert ours and all(row.median_us is None and "out of tolerance" in row.reason for row in ours)
    assert all(not row.ratios for row in rows)
    assert any(row.median_us for row in rows if row.provider == "conv2d")


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias=None: real(x, weight))
    rows = run_suites(["patch_embed"], "tiny", "cpu", threads=1)
    rival = [row for row in rows if row.provider == "rearrange + linear"]
    assert rival and all("does not compute the same" in row.reason for row in rival)


def test_a_missing_rival_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name.partition('.')[0]} can't be imported: not here")

    monkeypatch.setattr(peers, "import_peer", missing)
    rows = run_suites(["patch_embed"], "tiny", "cpu", threads=1)
    assert {row.reason for row in rows if row.rival == "timm"} == {"timm can't be imported: not here"}
    assert {row.reason for row in rows if row.rival == "huggingface"} == {"transformers can't be imported: not here"}
    assert all("timm" not in row.ratios for row in rows)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown suite 'speed'; known: add_norm, .*patch_embed, split_heads, masked"):
        run_suites(["speed"])
    with pytest.raises(ValueError, match="unknown size 'huge'; known: tiny, small, full"):
        run_suites(size="huge")


def test_settings_are_restored() -> None:
    threads = torch.get_num_threads()
    with runner.steady(torch.device("cpu"), threads + 1):
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads


def test_the_suites_run_under_pytest_benchmark(tmp_path: Path) -> None:
    stored = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", str(SUITE_FILE), "-p", "no:cacheprovider", "-k", "patch_embed"]
    command += [f"--benchmark-json={stored}", f"--rootdir={SUITE_FILE.parents[1]}"]
    # Told that it is a worker of pytest-xdist, pytest-benchmark would measure nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**inherited, "FASTVIT_BENCH_SIZE": "tiny", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {entry["extra_info"]["provider"] for entry in json.loads(stored.read_text())["benchmarks"]}
    assert {"fastvit:cpu", "conv2d"} <= found
