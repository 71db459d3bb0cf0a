"""The stages of the campaign that are about the C++/CUDA extension, on a CPU: its build, its primitives, its calls."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backend as backends
from fastvit import cuda
from fastvit.benchmarks.campaign import build, correctness, launch
from fastvit.benchmarks.campaign.output import FAILED, PASSED, SKIPPED
from fastvit.benchmarks.rows import Row, read_json_lines, versions
from fastvit.validation.faults import planted
from fastvit.validation.report import Report
from fastvit.validation.report import Row as Verdict
from tests.benchmarks.stage_results import last_figure

ROOT = Path(__file__).resolve().parents[2]


# build


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 without anything that builds for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "is_outdated", lambda: False)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.delenv("FASTVIT_BUILD_CUDA", raising=False)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tool itself, in a checkout of its own, and no nvcc in any of the places where it looks."""
    target = tmp_path / "checkout" / "tools" / "build_extension.py"
    target.parent.mkdir(parents=True)
    text, usual = (ROOT / "tools" / "build_extension.py").read_text(), 'Path("/usr/local/cuda")'
    assert usual in text
    target.write_text(text.replace(usual, 'Path("/nowhere")'))
    monkeypatch.setenv("CXX", shutil.which("c++") or shutil.which("g++") or "c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    return target


def test_each_gpu_has_an_architecture() -> None:
    known = {(8, 0): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100", (12, 1): "121"}
    assert {capability: build.architecture_of(*capability) for capability in known} == known


def test_without_nvcc_nothing_is_built_and_the_row_says_why(
    hopper: None, tool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.build(tmp_path, "cuda", tool) == SKIPPED
    figure = last_figure(capsys.readouterr().out)
    assert figure.startswith("not built: ") and "nvcc" in figure


def test_what_was_asked_for_and_can_not_be_built_fails(
    hopper: None, tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTVIT_BUILD_CUDA", "1")
    assert build.build(tmp_path, "cuda", tool) == FAILED
    assert last_figure(capsys.readouterr().out).startswith("not built: FASTVIT_BUILD_CUDA=1, but there is no nvcc")


def test_what_does_not_compile_fails_and_an_older_build_is_told_of(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("import sys; print('x.cu(3): error: what'); print('error: it does not compile', file=sys.stderr)")
    monkeypatch.setattr(cuda, "is_outdated", lambda: True)
    assert build.build(tmp_path, "cuda", tool) == FAILED
    printed = capsys.readouterr().out
    assert "x.cu(3): error: what\n" in printed
    assert last_figure(printed) == "not built: it does not compile; what is measured is an older build"


@pytest.mark.parametrize("text", ["", "raise SystemExit('no module named tool')"])
def test_a_tool_that_breaks_fails(text: str, hopper: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text(text)
    assert build.build(tmp_path, "cuda", tool) == FAILED
    assert last_figure(capsys.readouterr().out) == f"not built: {'no module named tool' if text else 'it said nothing'}"


def test_it_is_built_for_this_gpu_alone_and_must_load(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("import os; print(os.environ['FASTVIT_CUDA_ARCHS']); print('built: /here/_fastvit_cuda.so')")
    monkeypatch.setenv("FASTVIT_CUDA_ARCHS", "80;100")
    for reason, status in (("", PASSED), ("it can't be loaded", FAILED)):
        monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type, reason=reason: reason)
        assert build.build(tmp_path, "cuda", tool) == status
        printed = capsys.readouterr().out
        assert printed.startswith("90a\n") and last_figure(printed).startswith("built for sm_90a in 0 s")
        assert reason in last_figure(printed)


def test_without_a_checkout_it_is_skipped(hopper: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.build(tmp_path, "cuda", tmp_path / "tool.py") == SKIPPED
    assert "run this from a checkout" in last_figure(capsys.readouterr().out)
    assert build.TOOL == ROOT / "tools" / "build_extension.py" and build.TOOL.exists()


def test_installing_on_a_gpu_builds_nothing_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extension is the campaign's, which goes on without it."""
    found = _module(ROOT / "tools" / "gpu_env.py")
    asked: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append((command, options))
        return SimpleNamespace(stdout=str(tmp_path), returncode=7)

    monkeypatch.setattr(found.sys, "argv", ["gpu_env.py", str(tmp_path / "env")])
    monkeypatch.setattr(found.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(found.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("FASTVIT_BUILD_CUDA", "1")
    assert found.main() == 7
    command, options = asked[-1]
    assert {"--no-index", "--no-deps", "--no-build-isolation", "--editable"} <= set(command)
    assert options["env"]["FASTVIT_BUILD_CUDA"] == "0" and options["env"]["PATH"]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("is_built", [True, False])
def test_a_row_says_which_compiler_built_the_extension(is_built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built_with = ["g++ 13", "torch 2.11", "Build cuda_13.0"]
    monkeypatch.setattr(cuda, "build_info", lambda: {"versions": built_with} if is_built else {"reason": "no nvcc"})
    monkeypatch.setattr(cuda, "why_missing", lambda: "" if is_built else "not built")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 9)
    versions.cache_clear()
    assert versions("cuda")["nvcc"] == ("Build cuda_13.0" if is_built else "")
    versions.cache_clear()


# primitives


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_primitives_without_a_gpu_are_skipped_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert correctness.primitives(tmp_path) == SKIPPED
    reason = backends.why_unavailable("cuda", "cuda")
    assert reason and last_figure(capsys.readouterr().out) == reason
    (row,) = [json.loads(line) for line in (tmp_path / "validate.jsonl").read_text().splitlines()]
    assert (row["op"], row["status"], row["reason"]) == ("primitive", "skipped", reason)


@pytest.mark.parametrize("status", ["passed", "failed"])
def test_a_primitive_that_differs_fails(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (
        Verdict("cuda", "primitive", "bytes", "load_matrices", "bytes", "passed"),
        Verdict("cuda", "primitive", "bytes", "multiply_add", "bytes", status, where="from byte 5 on"),
        Verdict("cuda", "primitive", "bytes", "warpgroup", "bytes", "skipped", reason="not of this architecture"),
    )
    monkeypatch.setattr(correctness, "check_primitives", lambda device: Report(rows))
    assert correctness.primitives(tmp_path) == (PASSED if status == "passed" else FAILED)
    assert last_figure(capsys.readouterr().out) == Report(rows).summary()
    assert len((tmp_path / "validate.jsonl").read_text().splitlines()) == 3


# launch


def test_calls_are_timed_beside_torchs_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.launch(tmp_path, "cpu", rounds=2) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")
    assert len(rows) == 2 * 2 * 3 and len({row.case for row in rows}) == 4
    for row in rows:
        if row.provider == launch.ALONE:
            assert row.median_us is None and row.reason == "it computes on CUDA devices only"
        else:
            assert row.median_us and row.repeats == 2 and row.device and row.versions
        assert row.command == "make gpu STAGE=launch"
    times = {(row.shape, row.mode, row.provider): row.median_us or 0.0 for row in rows}
    for shape, mode, provider in times:
        if provider == "fastvit:cpu":
            assert times[shape, mode, provider] > times[shape, mode, launch.SCALE]
    printed = capsys.readouterr().out
    assert "torch.add" in printed and "not timed: fastvit:cuda (op alone), add_position" in printed
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


Given = dict[str, list[tuple[Any, ...]]]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    """In the place of the extension's ops, functions that note what they are given."""
    given: Given = {}

    def op(name: str, *shapes: Callable[[tuple[Any, ...]], Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            given.setdefault(name, []).append(arguments)
            results = tuple(make(arguments) for make in shapes)
            return results[0] if len(results) == 1 else results

        return run

    def tokens(arguments: tuple[Any, ...]) -> Tensor:
        pos_embed = next(tensor for tensor in arguments if isinstance(tensor, Tensor) and tensor.shape == (5, 192))
        return torch.zeros(1, 5, 192, dtype=pos_embed.dtype)

    def rows(_: tuple[Any, ...]) -> Tensor:
        return torch.zeros(5, 192)

    ops = SimpleNamespace(
        add_position_cuda=op("add_position", tokens),
        add_position_backward_cuda=op("add_position_backward", rows),
        patch_embed_cuda=op("patch_embed", tokens),
        patch_embed_backward_cuda=op(
            "patch_embed_backward", lambda _: torch.empty(0), lambda given: torch.zeros_like(given[3]),
            lambda _: torch.zeros(192), rows,
        ),
    )  # fmt: skip
    monkeypatch.setattr(torch.ops, "fastvit", ops)
    monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type: "")
    monkeypatch.setattr(launch, "backends_of", lambda device: ["cuda"])
    monkeypatch.setattr(launch, "check_backend", lambda *_: "")
    monkeypatch.setattr(launch, "CALLS", 1)
    backends.implementation.cache_clear()
    yield given
    backends.implementation.cache_clear()


def test_the_op_alone_is_given_what_the_public_function_gives_it(library: Given, tmp_path: Path) -> None:
    assert launch.launch(tmp_path, "cpu", rounds=1) == PASSED
    found: list[Row] = read_json_lines(tmp_path / "bench.jsonl")
    assert all(row.median_us for row in found) and len(found) == 2 * 2 * 3
    assert [row.whole for row in found[:3]] == [True, False, False]
    assert set(library) == {"add_position", "add_position_backward", "patch_embed", "patch_embed_backward"}
    for name, calls in library.items():
        # Gradients arrive as ones from autograd, and as the case's own where the op is called alone.
        alike = {tuple(map(_described, call)) for call in calls}
        assert len(alike) == 1, name
        assert len(calls) >= 2 * (launch.WARM_UP + 1), name


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):  # the numbers of small ones too: of constants
        return value.dtype, tuple(value.shape), value.stride(), str(value.tolist()) if value.numel() <= 12 else ""
    return tuple(value) if isinstance(value, list | tuple) else value
