"""The stages of the campaign that tell right from wrong, on a CPU and at tiny sizes."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvit import backend as backends
from fastvit import functional
from fastvit.backend import BACKENDS
from fastvit.benchmarks import problem
from fastvit.benchmarks.campaign import correctness, output, sanitize, tiny
from fastvit.benchmarks.campaign.output import FILES, FOR_GPUS, backends_of
from fastvit.benchmarks.campaign.runner import find_stages
from fastvit.benchmarks.campaign.stages import STAGES
from fastvit.validation import PatchEmbedCase, make_inputs
from fastvit.validation.faults import planted
from fastvit.validation.ops import OPS
from fastvit.validation.report import FAILED, PASSED, SKIPPED, Report, Row
from fastvit.validation.runner import backend_candidate, check_inputs
from tests.benchmarks.stage_results import last_figure, rows_in

# tests: pytest in a process of its own, as in the campaign

STAGE = """
import importlib.util, sys
from pathlib import Path
from fastvit.benchmarks.campaign import correctness
correctness.ONE_TEST, correctness.WORKERS = 2, 1
find, left_out = importlib.util.find_spec, sys.argv[2:]
importlib.util.find_spec = lambda name, *rest: None if name in left_out else find(name, *rest)
print("stage", correctness.tests(Path(sys.argv[1]), [sys.argv[1]]))
"""
# The hook that all tests share, and a CUDA that breaks.
CONFTEST = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("shared", {conftest!r})
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
pytest_runtest_teardown = shared.pytest_runtest_teardown
broken = torch.broken = []
def synchronize():
    if broken: raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize, torch.cuda.is_initialized = synchronize, lambda: True
"""
SUITE = """
import pytest, signal, time, torch
def test_bad(): assert 1 == 2, "one is\\nnot two"
def test_later(): pytest.skip("no GPU")
@pytest.fixture
def no_disk(): raise OSError("no disk")
def test_set_up(no_disk): pass
def test_breaks_cuda(): torch.broken.append(1)
def test_good(): assert not torch.broken
def test_after(): assert not torch.broken
def test_slow(): time.sleep(100)
def test_waits_for_the_gpu():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    time.sleep(100)
"""


def _run_tests(folder: Path, *left_out: str) -> str:
    """What the stage prints that runs the tests of a folder; with the modules that it is to do without."""
    command = [sys.executable, "-c", STAGE, str(folder), *left_out]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_each_test_becomes_a_row_and_one_that_hangs_or_breaks_cuda_does_not_hold_up_the_others(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(conftest=str(Path(__file__).parents[1] / "conftest.py")))
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "test_import.py").write_text("import no_such_module")
    printed = _run_tests(tmp_path)
    assert printed.endswith("stage failed\n")
    rows = rows_in(tmp_path / "tests.jsonl")
    started = [row["test"].split("::test_")[-1] for row in rows if row["status"] == "started"]
    assert started.index("breaks_cuda") < max(map(started.index, ("good", "after"))), "which need a CUDA that works"
    ended = [(row["test"].split("::")[-1].rpartition("/")[2], row) for row in rows if row["status"] != "started"]
    expected = {
        "test_after": "passed", "test_bad": "failed", "test_good": "passed", "test_import.py": "failed",
        "test_later": "skipped", "test_set_up": "failed", "test_slow": "failed", "test_waits_for_the_gpu": "failed",
    }  # fmt: skip
    # Of the one that breaks CUDA it shows after its own call.
    assert sorted((name, row["status"]) for name, row in ended) == sorted(
        [*expected.items(), ("test_breaks_cuda", "passed"), ("test_breaks_cuda", "failed")]
    )
    assert set(started) == {name.removeprefix("test_") for name, _ in ended if name != "test_import.py"}
    found = {name: row["message"] for name, row in ended}
    assert re.fullmatch(r".*test_some.py:3: AssertionError: one is", found["test_bad"])
    assert found["test_later"] == "Skipped: no GPU"
    assert re.fullmatch(r".*test_some.py:6: OSError: no disk", found["test_set_up"])
    assert "no_such_module" in found["test_import.py"] and "crashed while running" in found["test_waits_for_the_gpu"]
    assert "hung: it took longer than 2 s" in found["test_slow"]
    # At the start of a line: the summary tells it again where lines are wide enough.
    crashed = re.findall("^worker .* crashed while", (tmp_path / "tests.log").read_text(), re.MULTILINE)
    assert len(crashed) == 2, "the process of the slow one goes on"
    assert last_figure(printed) == "3 passed, 6 failed, 1 skipped" and "AssertionError: one is" in printed
    assert "0 passed, 1 failed, 0 skipped" in printed, "counts are told while the tests run"
    assert "not two" in (tmp_path / "tests.log").read_text()


def test_tests_that_pass_and_tests_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_some.py").write_text("def test_good(): pass")
    assert _run_tests(tmp_path, "xdist").endswith("stage passed\n")
    assert {path.name for path in tmp_path.iterdir()} - {"test_some.py", "__pycache__"} <= set(FILES)
    assert correctness.tests(tmp_path, [str(tmp_path / "nowhere")]) == FAILED
    assert "run this from a checkout" in capsys.readouterr().out
    assert [path for path in correctness.TESTS if not (correctness.ROOT / path).exists()] == []


def test_a_pytest_that_goes_wrong_shows_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: print("no such option") or 4)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert correctness.tests(tmp_path, [str(tmp_path)]) == FAILED
    assert "no such option" in capsys.readouterr().out


def test_float32_is_tested_as_float32() -> None:
    assert not torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


# limits


def test_patches_and_large_batches_against_float64_by_a_backend_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage,) = find_stages(STAGES, ["limits_cuda"])
    assert stage.run(tmp_path, **stage.dry) == PASSED
    rows = rows_in(tmp_path / "validate.jsonl")
    assert {(row["status"], row["backend"]) for row in rows} == {("passed", "cpu")}
    cases = list(dict.fromkeys(row["case"].split(", seed")[0] for row in rows))
    beyond = len(correctness.beyond_cases(0))
    assert [case.partition(" ")[0] for case in cases] == ["large"] * beyond + ["patch"] * 4, "the largest first"
    assert {"patch 7, channels_last, images uint8", "large batch, masked", "large batch of raw images"} <= set(cases)
    quantities = {row["quantity"] for row in rows}
    assert {"forward", "d_images", "d_weight", "d_bias", "d_pos_embed", "d_prefix", "d_tokens"} <= quantities
    printed = capsys.readouterr().out
    assert last_figure(printed) == f"passed: {len(rows)} passed, 0 failed, 0 skipped"
    assert all(f"cpu {op} bfloat16: large batch" in printed for op in ("patch_embed", "add_position"))
    assert "cpu patch_embed bfloat16: patch 7, nchw" in printed
    for name in FOR_GPUS:
        (stage,) = find_stages(STAGES, [f"limits_{name}"])
        assert stage.run(tmp_path, device="cpu") == SKIPPED, "as on a machine where it can't run"
        assert last_figure(capsys.readouterr().out).startswith(f"without {name}: ")


def test_a_backend_that_is_not_there_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {name: "" for name in BACKENDS} | {"cpu": "not here", "emulated": "not here", "cuda": "it is not built"}
    reasons["native"] = "not here"
    for module in (output, problem):
        monkeypatch.setattr(module, "available_backends", lambda device: reasons)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backends_of("cuda") == ["triton"]
    assert capsys.readouterr().out == "without cuda: it is not built\n"
    monkeypatch.setenv("FASTVIT_WITHOUT", "triton, cpu")
    assert backends_of("cuda") == []
    printed = capsys.readouterr().out
    assert printed == "without triton: FASTVIT_WITHOUT names it\nwithout cuda: it is not built\n"


def test_numbers_are_new_each_time_and_can_be_repeated() -> None:
    assert set(correctness.PATCHES) == {*range(2, 33, 2), 7}
    first, second, again = (next(correctness.patch_cases((2,), seed)) for seed in (1, 2, 1))
    images = [make_inputs(case, torch.bfloat16).tensors["images"] for case in (first, second, again)]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])  # type: ignore[arg-type]


def test_the_last_samples_lie_beyond_the_threshold() -> None:
    for case, what in correctness.beyond_cases(0):
        inputs = make_inputs(case, torch.bfloat16)
        for threshold in (2**20, correctness.THRESHOLD):
            batch = correctness.batch_beyond(case, inputs, what, threshold)
            if isinstance(case, PatchEmbedCase):
                sizes = {"given": 3 * 224 * 224, "result": (1 + (case.keep or case.patches)) * case.width}
            else:
                sizes = {"given": case.patches * case.width, "result": (1 + case.patches) * case.width}
            last = batch - correctness.EDGE
            assert last * sizes[what] >= threshold > (last - 1) * sizes[what]


@pytest.mark.parametrize("fault", ["one token zeroed", "last token not written", "last weight row's gradient scaled"])
def test_a_fault_in_the_last_sample_of_a_large_batch_is_seen(fault: str) -> None:
    case, _ = correctness.beyond_cases(0)[0]
    candidate = correctness.at_the_ends(backend_candidate("cpu"), case, 9)
    with planted(fault) as spoilt:
        rows = check_inputs(candidate, "patch_embed", make_inputs(case, torch.bfloat16))
    failed = {row.quantity for row in rows if row.status == "failed"}
    assert failed & {spoilt.spoils, "all"}


def test_values_that_are_not_written_between_the_ends_are_seen() -> None:
    case, _ = correctness.beyond_cases(0)[0]
    real = backend_candidate("cpu")

    def forward(op: str, inputs: object, tensors: object) -> torch.Tensor:
        result = real.forward(op, inputs, tensors).clone()  # type: ignore[arg-type]
        result[len(result) // 2] = float("nan")
        return result

    candidate = correctness.at_the_ends(replace(real, forward=forward), case, 9)
    (row,) = check_inputs(candidate, "patch_embed", make_inputs(case, torch.bfloat16))
    assert row.status == "failed" and "never written" in row.reason


def test_too_little_memory_skips_and_a_wrong_backend_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with planted("patch flattened in another order"):
        assert correctness.limits(tmp_path, "cpu", "cpu", (2,), ("bfloat16",), 2**19) == FAILED

    def allocate(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(correctness, "_random_like", allocate)
    (tmp_path / "validate.jsonl").unlink()
    assert correctness.limits(tmp_path, "cpu", "cpu", (2,), ("bfloat16",), 2**19) == PASSED
    skipped = [row["reason"] for row in rows_in(tmp_path / "validate.jsonl") if row["status"] == "skipped"]
    assert len(skipped) == len(correctness.beyond_cases(0)) and all("out of memory" in reason for reason in skipped)


# validate


def test_verdicts_are_written_as_they_come(tmp_path: Path) -> None:
    row = Row("cpu", "patch_embed", "float32", "case", "forward", PASSED)

    def parts() -> Iterator[Report]:
        yield Report((row,))
        assert len(rows_in(tmp_path / "validate.jsonl")) == 1, "a cut-off from here on leaves it"
        yield Report((replace(row, status=FAILED),))

    assert output.keep_verdicts(tmp_path, parts()) == FAILED


def test_the_validator_runs_an_op_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert correctness.validate(tmp_path, "cpu", "cpu", quick=True) == PASSED
    rows = rows_in(tmp_path / "validate.jsonl")
    assert {(row["op"], row["dtype"]) for row in rows if row["status"] == "passed"} == {
        (op, dtype) for op in OPS for dtype in ("float32", "bfloat16", "float16")
    }
    ops = [row["op"] for row in rows]
    assert ops == sorted(ops, key=lambda op: op != "patch_embed"), "the op that multiplies comes first"
    printed = capsys.readouterr().out
    assert last_figure(printed).startswith("passed: ")
    cases = {str(row["case"]) for row in rows}
    assert all(f"cpu patch_embed bfloat16: {case}\n" in printed for case in cases if f"add_position {case}" in printed)
    assert "0/7 cpu patch_embed bfloat16: " in printed and {row["backend"] for row in rows} == {"cpu"}


def test_a_broken_cuda_leaves_the_rows_of_what_it_broke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @functools.wraps(functional.add_position)  # by whose arguments it is called
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("fastvit.functional.add_position", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    assert correctness.validate(tmp_path, "cpu", "cpu", True, ["bfloat16"]) == FAILED
    rows = rows_in(tmp_path / "validate.jsonl")
    assert {row["op"] for row in rows if row["status"] == "passed"} == {*OPS} - {"add_position"}
    assert all("illegal memory" in row["reason"] for row in rows if row["op"] == "add_position")
    assert last_figure(capsys.readouterr().out).startswith("FAILED")


def test_a_backend_that_can_not_run_is_not_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert correctness.validate(tmp_path, "cuda", "cpu") == SKIPPED
    assert last_figure(capsys.readouterr().out) == "without cuda: it computes on CUDA devices only"
    monkeypatch.setenv("FASTVIT_WITHOUT", "cpu")
    assert correctness.validate(tmp_path, "cpu", "cpu") == SKIPPED
    assert last_figure(capsys.readouterr().out) == "without cpu: FASTVIT_WITHOUT names it"
    assert not (tmp_path / "validate.jsonl").exists()


# primitives


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_primitives_without_a_gpu_are_skipped_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert correctness.primitives(tmp_path) == SKIPPED
    reason = backends.why_unavailable("cuda", "cuda")
    assert reason and last_figure(capsys.readouterr().out) == reason
    (row,) = rows_in(tmp_path / "validate.jsonl")
    assert (row["op"], row["status"], row["reason"]) == ("primitive", "skipped", reason)


@pytest.mark.parametrize("status", ["passed", "failed"])
def test_a_primitive_that_differs_fails(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"load_matrices": "passed", "multiply_add": status, "warpgroup": "skipped"}
    rows = tuple(Row("cuda", "primitive", "bytes", name, "bytes", found) for name, found in names.items())
    monkeypatch.setattr(correctness, "check_primitives", lambda device: Report(rows))
    assert correctness.primitives(tmp_path) == status
    assert last_figure(capsys.readouterr().out) == Report(rows).summary()
    assert len(rows_in(tmp_path / "validate.jsonl")) == 3


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


def test_a_clean_run_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program that is run under the tool runs here too, on the CPU, without it."""
    (stage,) = find_stages(STAGES, ["sanitize"])
    assert stage.run(tmp_path, **stage.dry) == PASSED
    assert last_figure(capsys.readouterr().out) == "cpu memcheck 0 errors"


def test_errors_fail_and_are_printed(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool(
        f"""[ "$1 $3 $4" = "--tool --error-exitcode 86" ] || exit 9
echo "{tiny.STARTED}"; [ $2 = memcheck ] || {{ echo "{tiny.FINISHED}"
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
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of thousands of lines only so many are."""
    tool(
        f"""for i in 1 2 3 4 5; do echo "========= more $i"; done; echo "{tiny.STARTED}"
echo "{tiny.FINISHED}"; echo "========= ERROR SUMMARY: 0 errors" """
    )
    monkeypatch.setattr(sanitize, "MOST_LINES", 3)
    assert sanitize.sanitize(tmp_path, "cuda", ["cuda"], tools=["memcheck"]) == PASSED
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda memcheck: ")]
    words = [
        "========= more 1",
        "========= more 2",
        "========= more 3",
        tiny.STARTED,
        tiny.FINISHED,
        "passed: 0 errors",
    ]
    assert printed == [f"cuda memcheck: {line}" for line in words]


def test_without_a_tool_that_starts_it_is_skipped(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("")
    (tmp_path / "bin" / sanitize.PROGRAM).write_bytes(b"\x7fELF no program")
    assert sanitize.sanitize(tmp_path, "cuda", ["cuda"]) == SKIPPED
    assert last_figure(capsys.readouterr().out).startswith("cuda memcheck skipped: it can't work here: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.sanitize(tmp_path) == SKIPPED
    assert "compute-sanitizer is not on the PATH" in last_figure(capsys.readouterr().out)


def test_verdicts() -> None:
    finished, clean = [tiny.STARTED, tiny.FINISHED], "========= ERROR SUMMARY: 0 errors"
    for status, code, lines in (
        (PASSED, 0, [*finished, clean]),
        (FAILED, 1, [tiny.STARTED, "RuntimeError: tokens is not finite", clean]),
        (FAILED, 0, finished),  # the tool never said what it found
        (FAILED, sanitize.ERRORS, finished),
        # It can't work here.
        (SKIPPED, 1, [clean]),
        (SKIPPED, 1, []),
        (SKIPPED, 1, ["========= Error: Device not supported. Please refer to the documentation"]),
        (SKIPPED, 1, ["========= Program hit error 999", "========= ERROR SUMMARY: 1 error"]),
    ):
        assert sanitize.judge(code, lines)[0] == status


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
