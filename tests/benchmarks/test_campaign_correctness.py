"""The stages of the campaign that tell right from wrong, on a CPU and at tiny sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit.backend import BACKENDS
from fastvit.benchmarks import problem
from fastvit.benchmarks.campaign import backends as campaign_backends
from fastvit.benchmarks.campaign import correctness, limits, pytest_rows, sanitize, tiny
from fastvit.benchmarks.campaign.backends import backends_of
from fastvit.benchmarks.campaign.output import FAILED, FILES, PASSED, SKIPPED, understood
from fastvit.validation.cases import AddPositionCase, PatchEmbedCase, make_inputs
from fastvit.validation.faults import planted
from fastvit.validation.report import Report
from fastvit.validation.runner import backend_candidate, check_inputs
from tests.benchmarks.stage_results import last_figure, rows_in

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
BF16 = ("bfloat16",)
CPU = torch.device("cpu")


# tests

SUITE = """
import pytest, signal, time
def test_hung():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    time.sleep(100)
def test_good(): pass
def test_bad(): assert 1 == 2, "one is\\nnot two"
def test_later(): pytest.skip("no GPU")
@pytest.fixture
def broken(): raise OSError("no disk")
def test_set_up(broken): pass
"""


def test_each_test_becomes_a_row_and_one_that_hangs_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytest_timeout")
    pytest.importorskip("xdist")
    monkeypatch.setattr(correctness, "ONE_TEST", 2)
    monkeypatch.setattr(correctness, "GLANCE", 0.5)
    monkeypatch.setattr(correctness, "WORKERS", 1)
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "test_import.py").write_text("import no_such_module")
    assert correctness.tests(tmp_path, [str(tmp_path)]) == FAILED
    rows = rows_in(tmp_path / "tests.jsonl")
    started = [str(row["test"]).split("::")[-1] for row in rows if row["status"] == "started"]
    assert sorted(started) == ["test_bad", "test_good", "test_hung", "test_later", "test_set_up"]
    found = {str(row["test"]).split("::")[-1].split("/")[-1]: row for row in rows if row["status"] != "started"}
    assert {name: row["status"] for name, row in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_later": "skipped", "test_set_up": "failed",
        "test_import.py": "failed", "test_hung": "failed",
    }  # fmt: skip
    assert re.fullmatch(r".*test_some.py:7: AssertionError: one is", str(found["test_bad"]["message"]))
    assert found["test_later"]["message"] == "Skipped: no GPU"
    assert re.fullmatch(r".*test_some.py:10: OSError: no disk", str(found["test_set_up"]["message"]))
    assert "no_such_module" in str(found["test_import.py"]["message"])
    assert "crashed while running" in str(found["test_hung"]["message"])
    printed = capsys.readouterr().out
    assert last_figure(printed) == "1 passed, 4 failed, 1 skipped" and "AssertionError: one is" in printed
    told = [values for line in printed.splitlines() if (values := understood(line)) and "running" in values]
    assert any("test_hung" in str(values["running"]) for values in told)
    assert "0 passed, 0 failed, 0 skipped" in printed, "counts are told while the tests run"
    assert "one is" in (tmp_path / "tests.log").read_text()


def test_tests_that_pass_and_tests_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(correctness, "_has", lambda module: False)
    (tmp_path / "test_some.py").write_text("def test_good(): pass")
    assert correctness.tests(tmp_path, [str(tmp_path)]) == PASSED
    assert correctness.tests(tmp_path, [str(tmp_path / "nowhere")]) == FAILED
    assert "run this from a checkout" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} - {"test_some.py", "__pycache__"} <= set(FILES)


def test_the_tests_of_a_gpu_are_where_they_are_looked_for() -> None:
    assert [path for path in correctness.TESTS if not (correctness.ROOT / path).exists()] == []


def test_a_pytest_that_does_not_start_shows_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(correctness, "_pytest_arguments", lambda: ["-c", "raise SystemExit('no module named pytest')"])
    assert correctness.tests(tmp_path, [str(tmp_path)]) == FAILED
    assert "no module named pytest" in capsys.readouterr().out


def test_tests_that_have_not_ended_are_known() -> None:
    rows = [{"test": name, "status": status} for name, status in (
        ("a", "started"), ("a", "passed"), ("b", "started"), ("c", "started"), ("c", "failed"), ("d", "skipped"),
    )]  # fmt: skip
    assert correctness._running(rows) == ["b"]


BROKEN_CUDA = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("shared", {conftest!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
pytest_runtest_teardown = shared.pytest_runtest_teardown
broken = []
def synchronize():
    if broken: raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize, torch.cuda.is_initialized = synchronize, lambda: True
torch.broken = broken
"""
BREAKS_CUDA = """
import torch
def test_before(): pass
def test_breaks(): torch.broken.append(1)
def test_after(): assert not torch.broken
"""


def test_after_a_cuda_fault_the_other_tests_have_another_process(tmp_path: Path) -> None:
    """The hook that all tests share, in a pytest of its own whose CUDA breaks."""
    pytest.importorskip("xdist")
    conftest = Path(__file__).parents[1] / "conftest.py"
    (tmp_path / "conftest.py").write_text(BROKEN_CUDA.format(conftest=str(conftest)))
    (tmp_path / "test_some.py").write_text(BREAKS_CUDA)
    environment = {**os.environ, pytest_rows.VARIABLE: str(tmp_path / "rows.jsonl")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", pytest_rows.__name__, "-p", "no:cacheprovider"]
    subprocess.run([*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, check=False)
    found: dict[str, list[object]] = {}
    for row in rows_in(tmp_path / "rows.jsonl"):
        if row["status"] != "started":
            found.setdefault(str(row["test"]).split("::")[-1], []).append(row["status"])
    assert found["test_before"] == found["test_after"] == ["passed"]
    assert found["test_breaks"] == ["passed", "failed"], "it showed after the test's own call"


def test_float32_is_tested_as_float32() -> None:
    assert not torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


# limits


def test_patches_and_large_batches_against_float64(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limits.limits(tmp_path, "cpu", None, (7,), BF16, 2**19) == PASSED
    rows = rows_in(tmp_path / "validate.jsonl")
    assert {row["status"] for row in rows} == {"passed"} and {row["backend"] for row in rows} == {"cpu"}
    cases = list(dict.fromkeys(str(row["case"]).split(", seed")[0] for row in rows))
    beyond = len(limits.beyond_cases(0))
    assert len(cases) == 2 * 2 + beyond
    assert [case.partition(" ")[0] for case in cases] == ["large"] * beyond + ["patch"] * 4, "the largest first"
    assert {"patch 7, channels_last, images uint8", "large batch, masked", "large batch of raw images"} <= set(cases)
    quantities = {str(row["quantity"]) for row in rows}
    assert {"forward", "d_images", "d_weight", "d_bias", "d_pos_embed", "d_prefix", "d_tokens"} <= quantities
    printed = capsys.readouterr().out
    assert last_figure(printed) == f"passed: {len(rows)} passed, 0 failed, 0 skipped"
    assert all(f"cpu {op} bfloat16: large batch" in printed for op in ("patch_embed", "add_position"))
    assert "cpu patch_embed bfloat16: patch 7, nchw" in printed


def test_the_limits_hold_every_backend_that_runs(
    gpu_backends: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert limits.limits(tmp_path, "cpu", gpu_backends, (2,), BF16, 2**19) == PASSED
    rows = rows_in(tmp_path / "validate.jsonl")
    cases = [{row["case"] for row in rows if row["backend"] == name} for name in gpu_backends]
    assert cases[0] == cases[1] and len(cases[0]) == 4 + len(limits.beyond_cases(0))
    assert backends_of("cpu") == ["cpu", *gpu_backends]


def test_a_backend_that_is_not_there_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {name: "" for name in BACKENDS} | {"cpu": "not here", "emulated": "not here", "cuda": "it is not built"}
    for module in (campaign_backends, problem):
        monkeypatch.setattr(module, "available_backends", lambda device: reasons)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backends_of("cuda") == ["triton"]
    assert capsys.readouterr().out == "without cuda: it is not built\n"
    monkeypatch.setenv("FASTVIT_WITHOUT", "triton, cpu")
    assert backends_of("cuda") == []
    printed = capsys.readouterr().out
    assert printed == "without triton: FASTVIT_WITHOUT names it\nwithout cuda: it is not built\n"


def test_all_even_patches_up_to_32_are_among_the_limits() -> None:
    assert set(limits.PATCHES) == {*range(2, 33, 2), 7}
    cases = list(limits.patch_cases(limits.PATCHES, 1))
    assert {case.patch[0] for case in cases} == set(limits.PATCHES) and {c.layout for c in cases} > {"nchw"}


def test_numbers_are_new_each_time_and_can_be_repeated() -> None:
    first, second, again = (next(limits.patch_cases((2,), seed)) for seed in (1, 2, 1))
    images = [make_inputs(case, torch.bfloat16).tensors["images"] for case in (first, second, again)]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])  # type: ignore[arg-type]


def test_the_last_samples_lie_beyond_the_threshold() -> None:
    for beyond in limits.beyond_cases(0):
        for threshold in (2**20, limits.THRESHOLD):
            batch = beyond.samples(threshold)
            case = replace(beyond.case, batch=batch)
            if isinstance(case, PatchEmbedCase):
                values = {"input": batch * 3 * 224 * 224, "result": batch * (1 + case.patches) * case.width}
            else:
                assert isinstance(case, AddPositionCase)
                values = {"input": batch * case.patches * case.width, "result": batch * (1 + case.patches) * case.width}
            each = values[beyond.what] // batch
            assert (batch - limits.EDGE) * each >= threshold > (batch - limits.EDGE - 1) * each
            assert beyond.bytes_needed(batch) > values["result"] * 2 + values["input"]
        assert beyond.bytes_needed(batch) < 70 * limits.GIB, "all of it runs on a GPU of 80 GB"


@pytest.mark.parametrize("fault", ["one token zeroed", "last token not written", "last weight row's gradient scaled"])
def test_a_fault_in_the_last_sample_of_a_large_batch_is_seen(fault: str) -> None:
    beyond = limits.beyond_cases(0)[0]
    batch = beyond.samples(2**20)
    candidate = limits.at_the_ends(backend_candidate("cpu"), beyond.case, batch)
    inputs = make_inputs(beyond.case, torch.bfloat16)
    with planted(fault) as spoilt:
        rows = check_inputs(candidate, "patch_embed", inputs)
    failed = {row.quantity for row in rows if row.status == "failed"}
    assert failed & {spoilt.spoils, "all"}


def test_values_that_are_not_written_between_the_ends_are_seen() -> None:
    beyond = limits.beyond_cases(0)[0]
    real = backend_candidate("cpu")

    def forward(op: str, inputs: object, tensors: object) -> torch.Tensor:
        result = real.forward(op, inputs, tensors).clone()  # type: ignore[arg-type]
        result[len(result) // 2] = float("nan")
        return result

    candidate = limits.at_the_ends(replace(real, forward=forward), beyond.case, 9)
    (row,) = check_inputs(candidate, "patch_embed", make_inputs(beyond.case, torch.bfloat16))
    assert row.status == "failed" and "never written" in row.reason


def test_too_little_memory_skips_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "_free_bytes", lambda device: 2**30)
    assert limits.limits(tmp_path, "cpu", ["cpu"], (2,), BF16) == PASSED
    skipped = [row for row in rows_in(tmp_path / "validate.jsonl") if row["status"] == "skipped"]
    assert len(skipped) == len(limits.beyond_cases(0))
    assert (
        "GiB of memory, 1 GiB are free" in str(skipped[0]["reason"]) and "skipped 1: needs" in capsys.readouterr().out
    )


def test_a_wrong_backend_fails_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_free_bytes", lambda device: 0)
    with planted("patch flattened in another order"):
        assert limits.limits(tmp_path, "cpu", ["cpu"], (2,), BF16) == FAILED


# validate


def test_the_validator_runs_an_op_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert correctness.validate("cpu", tmp_path, "cpu", quick=True) == PASSED
    rows = rows_in(tmp_path / "validate.jsonl")
    assert {(row["op"], row["dtype"]) for row in rows if row["status"] == "passed"} == {
        (op, dtype) for op in ("patch_embed", "add_position") for dtype in ("float32", "bfloat16", "float16")
    }
    printed = capsys.readouterr().out
    assert last_figure(printed).startswith("passed: ")
    cases = {str(row["case"]) for row in rows}
    assert all(f"cpu patch_embed bfloat16: {case}\n" in printed for case in cases if f"add_position {case}" in printed)
    assert "0/7 cpu patch_embed bfloat16: " in printed and {row["backend"] for row in rows} == {"cpu"}


def test_what_ends_the_validator_is_a_failed_case_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = correctness.validate_backends

    def run(backends: list[str], ops: list[str], dtypes: list[str], *rest: Any) -> Report:
        if (ops, dtypes) != (["patch_embed"], ["bfloat16"]):
            return real(backends, ops, dtypes, *rest)
        rest[-1](3, 7, "cpu patch_embed bfloat16: one patch")
        raise RuntimeError("an illegal memory access was encountered")

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(correctness, "validate_backends", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    assert correctness.validate("cpu", tmp_path, "cpu", quick=True) == FAILED
    rows = rows_in(tmp_path / "validate.jsonl")
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert "one patch" in str(failed["case"]) and "illegal memory access" in str(failed["reason"])
    assert len({(row["op"], row["dtype"]) for row in rows}) == 6
    assert last_figure(capsys.readouterr().out).startswith("FAILED")


def test_a_backend_that_can_not_run_is_not_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert correctness.validate("cuda", tmp_path, "cpu") == SKIPPED
    assert last_figure(capsys.readouterr().out) == "without cuda: it computes on CUDA devices only"
    monkeypatch.setenv("FASTVIT_WITHOUT", "cpu")
    assert correctness.validate("cpu", tmp_path, "cpu") == SKIPPED
    assert last_figure(capsys.readouterr().out) == "without cpu: FASTVIT_WITHOUT names it"
    assert not (tmp_path / "validate.jsonl").exists()


# sanitize

Tool = Callable[[str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """A program in place of compute-sanitizer, alone on the PATH beside the shell's."""

    def make(script: str) -> None:
        path = tmp_path / "bin" / sanitize.PROGRAM
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.defpath}")
    monkeypatch.setattr(sanitize, "FOLDERS", ())
    return make


def test_a_clean_run_passes(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program that is run under the tool runs here too, on the CPU."""
    tool(
        f"""[ "$1 $3 $4" = "--tool --error-exitcode 86" ] || exit 9
name=$2; shift 4; echo "========= COMPUTE-SANITIZER"
[ $name != memcheck ] && echo "{tiny.STARTED}" && echo "{tiny.FINISHED}" &&
    echo "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)" && exit
"$@" || exit 1; echo "========= ERROR SUMMARY: 0 errors" """
    )
    assert sanitize.sanitize(tmp_path, "cpu") == PASSED
    figure = "cpu memcheck 0 errors; cpu racecheck 0 errors; cpu synccheck 0 errors"
    assert last_figure(capsys.readouterr().out) == figure


def test_errors_fail_and_are_printed(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool(
        f"""echo "{tiny.STARTED}"; [ $2 = memcheck ] || {{ echo "{tiny.FINISHED}"
echo "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"; exit 86; }}
echo "========= Invalid __global__ write of size 4 bytes"; echo "========= ERROR SUMMARY: 1 error"; exit 86"""
    )
    assert sanitize.sanitize(tmp_path, "cuda", ["triton", "cuda"]) == FAILED
    printed = capsys.readouterr().out
    assert last_figure(printed) == "; ".join(
        f"{name} {words}"
        for name in ("triton", "cuda")
        for words in ("memcheck 1 errors", "racecheck 2 errors", "synccheck 2 errors")
    )
    assert "cuda memcheck: ========= Invalid __global__ write" in printed


def test_what_a_tool_prints_is_passed_on_as_it_comes(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool waits until its first words were heard; of its thousands only so many are."""
    heard = tmp_path / "heard"
    tool(
        f"""echo "========= first"; for i in 1 2 3 4 5 6 7 8 9 10; do [ -e {heard} ] || sleep 0.5; done
[ -e {heard} ] || exit 9; for i in 1 2 3 4 5; do echo "========= more"; done; echo "{tiny.STARTED}"
echo "{tiny.FINISHED}"; echo "========= ERROR SUMMARY: 0 errors" """
    )
    lines: list[str] = []

    def say(run: str, words: str) -> None:
        heard.touch()
        lines.append(f"{run}: {words}")

    monkeypatch.setattr(sanitize, "_say", say)
    monkeypatch.setattr(sanitize, "TOOLS", ("memcheck",))
    monkeypatch.setattr(sanitize, "MOST_LINES", 3)
    assert sanitize.sanitize(tmp_path, "cuda", ["cuda"]) == PASSED
    words = ["========= first", "========= more", "========= more", tiny.STARTED, tiny.FINISHED, "passed: 0 errors"]
    assert lines == [f"cuda memcheck: {line}" for line in words]


def test_without_the_tool_it_is_skipped(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.sanitize(tmp_path) == SKIPPED
    printed = capsys.readouterr().out
    assert "skipped: compute-sanitizer is not on the PATH" in printed and "not on the PATH" in last_figure(printed)


@pytest.mark.parametrize(
    "script",
    [
        'echo "========= Error: Device not supported. Please refer to the documentation"; exit 1',
        'echo "========= COMPUTE-SANITIZER"; echo "========= Program hit error 999"; '
        'echo "========= ERROR SUMMARY: 1 error"; exit 1',
        "exit 1",
    ],
)
def test_a_tool_that_can_not_work_here_is_skipped(
    script: str, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool(script)
    assert sanitize.sanitize(tmp_path, "cuda", ["cuda"]) == SKIPPED
    assert "cuda memcheck skipped: it can't work here: " in last_figure(capsys.readouterr().out)


def test_a_tool_that_does_not_start_is_skipped(tool: Tool, tmp_path: Path) -> None:
    tool("")
    (tmp_path / "bin" / sanitize.PROGRAM).write_bytes(b"\x7fELF no program")
    assert sanitize.sanitize(tmp_path, "cuda", ["cuda"]) == SKIPPED


def test_verdicts() -> None:
    started, clean = f"{tiny.STARTED}\n", "========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.judge(0, started + tiny.FINISHED + "\n" + clean).status == PASSED
    assert sanitize.judge(1, started + "RuntimeError: tokens is not finite\n" + clean).status == FAILED
    assert sanitize.judge(0, started + tiny.FINISHED).status == FAILED, "the tool never said what it found"
    assert sanitize.judge(sanitize.ERRORS, started + tiny.FINISHED).status == FAILED
    assert sanitize.judge(1, clean).status == SKIPPED


def test_the_tiny_program_reaches_every_kind_of_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    tiny.run("cpu", "cpu")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == tiny.STARTED and printed[-1] == tiny.FINISHED and len(printed) == len(tiny.CASES) + 2
    with planted("last token not written"), pytest.raises(RuntimeError, match="patch 16, raw, bfloat16: tokens is not"):
        tiny.run("cpu", "cpu")


def test_the_tiny_program_has_more_tiles_than_a_gpu_has_multiprocessors() -> None:
    """By the rule of csrc/patch_embed_instances.h, with the multiprocessors of an H200."""
    cases = [case for case, _ in tiny.CASES if isinstance(case, PatchEmbedCase)]
    tiles = [-(-case.batch * (case.keep or case.patches) // 128) * -(-case.width // 128) for case in cases]
    assert {case.images for case, count in zip(cases, tiles, strict=True) if count >= 132} == {"uint8", "same"}
    assert sum(count < 132 for count in tiles) >= 6
