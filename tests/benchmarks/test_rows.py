"""Rows: written whole, read back, printed with losses; and the numbers a timing is summarised by."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastvit import cuda
from fastvit.benchmarks import timing
from fastvit.benchmarks.rows import (
    Row,
    commit,
    device_name,
    format_table,
    processor,
    read_json_lines,
    versions,
    write_json_lines,
)
from fastvit.benchmarks.timing import Ceilings, Timing, interleave, peak_bytes

KEYS = {
    "op", "shape", "dtype", "layout", "provider", "mode", "median_us", "p20_us", "p80_us", "repeats", "peak_bytes",
    "floor_share", "ratios", "device", "versions", "commit", "command",
}  # fmt: skip


def test_rows_survive_the_file(tmp_path: Path, four_rows: list[Row]) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    write_json_lines(four_rows, path)
    assert read_json_lines(path) == four_rows and list(path.parent.iterdir()) == [path]
    assert set(json.loads(path.read_text().splitlines()[0])) >= KEYS


@pytest.mark.parametrize("text", ["{", '{"op": "x"}', '{"unknown": 1}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows.jsonl, line 1: not a benchmark row"):
        read_json_lines(path)


def test_the_table_prints_ratios_losses_and_reasons(four_rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200, record=True, force_terminal=True)
    console.print(format_table(four_rows))
    plain = console.export_text(clear=False)
    assert "1.50x" in plain and "0.80x" in plain and "linear, forward: not installed" in plain and "2.25 ms" in plain
    assert "\x1b[31m0.80x" in console.export_text(styles=True)
    Console().print(format_table([]))
    assert "no rows" in capsys.readouterr().out


def test_rows_say_where_they_come_from() -> None:
    assert "thread" in device_name(torch.device("cpu"))
    assert versions("cpu")["torch"] == torch.__version__
    assert isinstance(commit(), str)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AMD EPYC", "AMD EPYC family 26 model 2"),
        ("Intel(R) Xeon(R) CPU @ 2.60GHz", "Intel(R) Xeon(R) CPU @ 2.60GHz family 26 model 2"),
        ("AMD EPYC 9755 128-Core Processor", "AMD EPYC 9755 128-Core Processor"),
    ],
)
def test_a_name_that_hides_the_processor_has_its_family(tmp_path: Path, name: str, said: str) -> None:
    one = "processor\t: {}\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {}\n\n"
    (tmp_path / "cpuinfo").write_text(one.format(0, name) + one.format(1, "another"))
    assert processor(tmp_path / "cpuinfo") == said


def test_a_processor_without_information_has_a_name(tmp_path: Path) -> None:
    assert processor(tmp_path / "none")
    (tmp_path / "arm").write_text("processor\t: 0\nCPU part\t: 0xd40\n")
    assert "family" not in processor(tmp_path / "arm")


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_COMMIT", "0123456789ab")
    assert commit.__wrapped__() == "0123456789ab"
    monkeypatch.setenv("FASTVIT_COMMIT", "")
    assert commit.__wrapped__() == commit()


def test_a_timing_is_the_median_and_its_spread() -> None:
    timing = Timing.of([float(value) for value in range(11)])
    assert (timing.median_us, timing.p20_us, timing.p80_us, timing.repeats) == (5.0, 2.0, 8.0, 11)


def test_calls_take_turns_and_start_in_turn() -> None:
    order: list[str] = []
    interleave([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), 0.0)
    rounds = order[3 + 3 + 2 :]  # after the warm-up and the estimate
    assert rounds[:4] == ["a", "b", "b", "a"] and rounds.count("a") == rounds.count("b") >= 7
    assert interleave([], torch.device("cpu"), 1.0) == []


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1
        del first
        return second + 1

    peak = peak_bytes(call, torch.device("cpu"))
    assert peak is not None and 8000 <= peak < 9000


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    limits = Ceilings(flops_per_us=10.0, bytes_per_us=2.0)
    assert limits.floor_us(100.0, 4.0) == 10.0 and limits.floor_us(10.0, 40.0) == 20.0


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
            timing.ceilings.__wrapped__(torch.device("cpu"), torch.float32)
            assert seen.pop() == precision and matmul.fp32_precision == "none"
    finally:
        convolution.fp32_precision = before


@pytest.mark.parametrize("is_built", [True, False])
def test_a_row_says_which_compiler_built_the_extension(is_built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built_with = ["g++ 13", "torch 2.11", "Build cuda_13.0"]
    monkeypatch.setattr(cuda, "build_info", lambda: {"versions": built_with} if is_built else {"reason": "no nvcc"})
    monkeypatch.setattr(cuda, "why_missing", lambda: "" if is_built else "not built")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 9)
    versions.cache_clear()
    assert versions("cuda")["nvcc"] == ("Build cuda_13.0" if is_built else "")
    versions.cache_clear()


KEPT = """
import resource, torch
from fastvit.benchmarks import problem, runner, tune
from fastvit.interop import measuring
if {keep}:
    with problem.steady(torch.device("cpu")):
        pass
def fault_count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):  # until the heap has settled, as by warm-up: seen to take up to ten
    torch.zeros(2**23)  # 32 MB, written to
before = fault_count()
torch.zeros(2**23)
print(fault_count() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_kept() -> None:
    """A large block freed and asked for again: from the kernel, page by page, unless it is kept, as it is by what
    measures alone, and not by an import."""
    faults = {}
    for keep in (True, False):
        command = [sys.executable, "-c", KEPT.format(keep=keep)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        faults[keep] = int(run.stdout)
    assert faults[True] < 64 < faults[False], "fewer than one a huge page of 2 MB, or one a page"
