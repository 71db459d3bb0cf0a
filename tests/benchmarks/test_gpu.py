"""The GPU campaign where there is no GPU: it says so, and its parts that need none work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastvit.benchmarks import gpu

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--stage", "bench"]])
def test_without_a_gpu_it_exits_with_1_and_says_why(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert gpu.main([*arguments, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "no CUDA device" in printed.err and not out.exists()
    assert ("warm (at most" in printed.out) == ("--dry-run" in arguments)


@without_gpu
def test_as_a_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastvit.benchmarks.gpu", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1 and "no CUDA device" in run.stderr


def test_the_limits_fit_into_nine_minutes() -> None:
    assert gpu.BUDGET < 9 * 60 - 15
    assert {stage.name for stage in gpu.STAGES} == {"warm", "tests", "validate", "bench"}


def _fake_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, str], **options: float) -> int:
    """Run the campaign with each stage replaced by a line of Python."""
    real = subprocess.Popen

    def start(command: list[str], **arguments: object) -> object:
        name = command[command.index("--inside") + 1]
        return real([sys.executable, "-u", "-c", codes[name]], **arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    stages = [gpu.Stage(name, 2, lambda out: 0) for name in codes]
    return gpu.campaign(stages, tmp_path, options.get("budget", 60.0), {"device": "none"})


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages_are_followed_cut_off_and_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    codes = {
        "good": "print('hello')",
        "bad": "raise SystemExit(3)",
        "slow": "import time; print('begun'); time.sleep(60)",
        "last": "print('still here')",
    }
    assert _fake_campaign(tmp_path, monkeypatch, codes) == 1
    assert time.monotonic() - started < 30
    summary = _lines(tmp_path / "summary.jsonl")
    assert [row.get("status") for row in summary[1:]] == ["passed", "failed", "cut off", "passed"]
    printed = [str(row["text"]) for row in _lines(tmp_path / "log.jsonl")]
    assert {"hello", "begun", "still here"} <= set(printed) and "[good] hello" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) <= 8


def test_no_stage_starts_when_the_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fake_campaign(tmp_path, monkeypatch, {"late": "print(1)"}, budget=1.0) == 1
    assert _lines(tmp_path / "summary.jsonl")[1]["status"] == "no time left"


def test_junit_becomes_rows(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b" time="0.5"/>'
        '<testcase classname="a" name="c"><failure message="wrong&#10;more"/></testcase>'
        '<testcase classname="a" name="d"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    rows = list(gpu.read_junit(path))
    assert [(row["status"], row["message"]) for row in rows] == [
        ("passed", ""),
        ("failed", "wrong"),
        ("skipped", "no GPU"),
    ]


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
from fastvit.benchmarks.gpu import warm_entry
from fastvit.kernels import manifest
for kernel in ("add_position", "sum_rows"):
    entry = next(entry for entry in manifest.entries() if entry.kernel == kernel)
    assert warm_entry(entry).asm["cubin"]
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
