"""What the stages of the campaign do, on a CPU and at tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvit import tuning as tables
from fastvit.backend import BACKENDS
from fastvit.benchmarks import problem
from fastvit.benchmarks import tune as tuner
from fastvit.benchmarks.campaign import backends as campaign_backends
from fastvit.benchmarks.campaign import correctness, limits, profiles, sanitize, tiny, tuning
from fastvit.benchmarks.campaign.backends import backends_of
from fastvit.benchmarks.campaign.ceilings import ceilings
from fastvit.benchmarks.campaign.output import FAILED, FILES, PASSED, SKIPPED, understood
from fastvit.benchmarks.campaign.suites import headline, not_timed, suite
from fastvit.benchmarks.profiling import Setup
from fastvit.benchmarks.rows import Row, read_json_lines
from fastvit.kernels import manifest
from fastvit.validation.cases import AddPositionCase, PatchEmbedCase, make_inputs
from fastvit.validation.faults import planted
from fastvit.validation.runner import backend_candidate, check_inputs

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
BF16 = ("bfloat16",)


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _figure(printed: str) -> str:
    """The last one that a stage reported."""
    values = [found for line in printed.splitlines() if (found := understood(line)) and "figure" in found]
    return str(values[-1]["figure"])


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
    assert _figure(printed) == "0 of 1 kernels compiled" and f"\n{first[0].name}: " in printed


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
    found = {str(row["test"]).split("::")[-1].split("/")[-1]: row for row in _rows(tmp_path / "tests.jsonl")}
    assert {name: row["status"] for name, row in found.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_later": "skipped", "test_set_up": "failed",
        "test_import.py": "failed", "test_hung": "failed",
    }  # fmt: skip
    assert found["test_bad"]["message"] == "AssertionError: one is"
    assert found["test_later"]["message"] == "Skipped: no GPU" and found["test_set_up"]["message"] == "OSError: no disk"
    assert "no_such_module" in str(found["test_import.py"]["message"])
    assert "crashed while running" in str(found["test_hung"]["message"])
    printed = capsys.readouterr().out
    assert _figure(printed) == "1 passed, 4 failed, 1 skipped" and "test_bad: AssertionError: one is" in printed
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


# limits


def test_patches_and_large_batches_against_float64(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert limits.limits(tmp_path, "cpu", None, (7,), BF16, 2**19) == PASSED
    rows = _rows(tmp_path / "validate.jsonl")
    assert {row["status"] for row in rows} == {"passed"} and {row["backend"] for row in rows} == {"cpu"}
    cases = {str(row["case"]).split(", seed")[0] for row in rows}
    assert len(cases) == 2 * 2 + len(limits.beyond_cases(0))
    assert {"patch 7, channels_last, images uint8", "large batch, masked", "large batch of raw images"} <= cases
    quantities = {str(row["quantity"]) for row in rows}
    assert {"forward", "d_images", "d_weight", "d_bias", "d_pos_embed", "d_prefix", "d_tokens"} <= quantities
    assert _figure(capsys.readouterr().out) == f"passed: {len(rows)} passed, 0 failed, 0 skipped"


def test_the_limits_hold_every_backend_that_runs(
    gpu_backends: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert limits.limits(tmp_path, "cpu", gpu_backends, (2,), BF16, 2**19) == PASSED
    rows = _rows(tmp_path / "validate.jsonl")
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
    skipped = [row for row in _rows(tmp_path / "validate.jsonl") if row["status"] == "skipped"]
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
    assert correctness.validate(tmp_path, "cpu", quick=True) == PASSED
    rows = _rows(tmp_path / "validate.jsonl")
    assert {(row["op"], row["dtype"]) for row in rows if row["status"] == "passed"} == {
        (op, dtype) for op in ("patch_embed", "add_position") for dtype in ("float32", "bfloat16", "float16")
    }
    assert _figure(capsys.readouterr().out).startswith("passed: ")


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
    assert _figure(capsys.readouterr().out) == figure


def test_errors_fail_and_are_printed(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool(
        f"""echo "{tiny.STARTED}"; [ $2 = memcheck ] || {{ echo "{tiny.FINISHED}"
echo "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"; exit 86; }}
echo "========= Invalid __global__ write of size 4 bytes"; echo "========= ERROR SUMMARY: 1 error"; exit 86"""
    )
    assert sanitize.sanitize(tmp_path, "cuda", ["triton", "cuda"]) == FAILED
    printed = capsys.readouterr().out
    assert _figure(printed) == "; ".join(
        f"{name} {words}"
        for name in ("triton", "cuda")
        for words in ("memcheck 1 errors", "racecheck 2 errors", "synccheck 2 errors")
    )
    assert "cuda memcheck: ========= Invalid __global__ write" in printed


def test_without_the_tool_it_is_skipped(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.sanitize(tmp_path) == SKIPPED
    printed = capsys.readouterr().out
    assert "skipped: compute-sanitizer is not on the PATH" in printed and "not on the PATH" in _figure(printed)


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
    assert "cuda memcheck skipped: it can't work here: " in _figure(capsys.readouterr().out)


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


# ceilings and suites


def test_rows_of_all_stages_stand_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ceilings(tmp_path, "cpu", size=32, values=2**10, seconds=0.001) == PASSED
    assert "TFLOP/s; copy " in _figure(capsys.readouterr().out)
    assert suite("add_position", tmp_path, "cpu", "tiny", 0.001) == PASSED
    assert suite("add_position", tmp_path, "cpu", "tiny", 0.001) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")
    assert [row.dtype for row in rows[:4]] == ["bfloat16", "float32, tf32", "float32, ieee", "float32"]
    assert all(row.op == "ceiling" and row.median_us and row.device and row.versions for row in rows[:4])
    assert all(row.flops == 2 * 32**3 for row in rows[:3]) and rows[3].moved_bytes == 8 * 2**10
    assert {row.op for row in rows[4:]} == {"add_position"} and len(rows) == 4 + 2 * len(rows[4:]) // 2
    assert rows[0].command == "make gpu STAGE=ceilings" and rows[4].command == "make gpu STAGE=add_position"
    assert "6 cases; " in _figure(capsys.readouterr().out)
    assert torch.backends.cuda.matmul.fp32_precision not in ("tf32",)


def test_a_suite_with_wrong_results_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with planted("add_position: last column wrong"):
        assert suite("add_position", tmp_path, "cpu", "tiny", 0.001) == FAILED
    printed = capsys.readouterr().out
    assert "not timed: fastvit:cpu" in printed and _figure(printed).endswith("6 not timed")


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


def test_the_table_is_written_model_by_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []
    choice = tables.Choice("cpu", {"reference": 2.0, "cpu": 1.0}, excluded={"triton": "wrong"})

    def measure(device: str, models: list[str], quick: bool, progress: object) -> tables.Table:
        if asked:
            assert tables.Table.load(tmp_path / "tuning.json").choices
        asked.append(tuple(models))
        width = len(asked)
        problem = tables.Problem("add_position", "forward", *[torch.float32] * 3, (width,), False)
        return tables.Table("a GPU", {"torch": "2"}, {problem: {8: choice}})

    monkeypatch.setattr(tuner, "tune", measure)
    assert tuning.tune(tmp_path, "cpu") == PASSED
    assert asked == [("S",), ("B",)] and len(tables.Table.load(tmp_path / "tuning.json").choices) == 2
    assert _figure(capsys.readouterr().out) == "2 choices: cpu 2; 2 candidates excluded"
    assert [path.name for path in tmp_path.iterdir()] == ["tuning.json"]


def test_profiles_are_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Setup("Ti", 1), Setup("Ti", 1, provider="nobody")
    assert profiles.profiles(tmp_path, "cpu", [good], depth=1) == PASSED
    assert _figure(capsys.readouterr().out).startswith("Ti fastvit: ")
    assert profiles.profiles(tmp_path, "cpu", [bad, good], depth=1) == FAILED
    assert _figure(capsys.readouterr().out).startswith("1 failed; Ti fastvit: ")
    rows = _rows(tmp_path / "profile.jsonl")
    assert {row["model"] for row in rows} == {"Ti"} and sum(float(str(row["share"])) for row in rows) == pytest.approx(
        2.0, abs=0.01
    )


def test_eager_profiles_come_first() -> None:
    setups = profiles.plan(["triton", "cuda"])
    assert [setup.compiled for setup in setups] == [False] * 6 + [True] * 4
    for compiled, ours in ((False, ["fastvit:triton", "fastvit:cuda"]), (True, ["fastvit"])):
        asked = {(setup.model, setup.provider) for setup in setups if setup.compiled == compiled}
        assert asked == {(model, provider) for model in "SB" for provider in (*ours, "timm")}


def test_every_backend_that_runs_is_profiled(
    gpu_backends: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "MODELS", ("Ti",))
    monkeypatch.setattr(profiles, "BATCH", 1)
    real = profiles.plan
    monkeypatch.setattr(profiles, "plan", lambda names: [setup for setup in real(names) if not setup.compiled])
    profiles.profiles(tmp_path, "cpu", depth=1)
    providers = {row["provider"] for row in _rows(tmp_path / "profile.jsonl")}
    assert providers - {"timm"} == {f"fastvit:{name}" for name in ("cpu", *gpu_backends)}
