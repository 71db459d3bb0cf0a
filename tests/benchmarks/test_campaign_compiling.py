"""The stages of the campaign that compile, on a CPU: the C++/CUDA extension's build, and Triton's kernels."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvit import cuda
from fastvit.benchmarks.campaign import compiling
from fastvit.kernels import launch, manifest
from fastvit.validation.report import FAILED, PASSED, SKIPPED
from tests.benchmarks.stage_results import last_figure, said

ROOT = Path(__file__).resolve().parents[2]


# build


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 without a library, and without anything that builds for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "is_outdated", lambda: False)
    monkeypatch.setattr(cuda, "why_missing", lambda: "the C++/CUDA extension is not built")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.delenv("FASTVIT_BUILD_CUDA", raising=False)


def _tool(folder: Path, text: str) -> Path:
    path = folder / "checkout" / "tools" / "build_extension.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_each_gpu_has_an_architecture() -> None:
    known = {(8, 0): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100", (12, 1): "121"}
    assert {capability: compiling.architecture_of(*capability) for capability in known} == known


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_without_nvcc_nothing_is_built_and_the_row_says_why(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the tool itself, in a checkout of its own, and no nvcc in any of the places where it looks."""
    text, usual = compiling.TOOL.read_text(), 'Path("/usr/local/cuda")'
    assert usual in text and compiling.TOOL == ROOT / "tools" / "build_extension.py"
    tool = _tool(tmp_path, text.replace(usual, 'Path("/nowhere")'))
    monkeypatch.setenv("CXX", shutil.which("c++") or shutil.which("g++") or "c++")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FASTVIT_BUILD_CUDA", mode)
    assert compiling.build(tmp_path, tool) == (SKIPPED if mode == "auto" else FAILED)
    figure = last_figure(capsys.readouterr().out)
    asked_for = "FASTVIT_BUILD_CUDA=1, but there is no nvcc"
    assert figure.startswith("not built: ") and "nvcc" in figure and (asked_for in figure) == (mode == "1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it said nothing"),
        ("raise SystemExit('no module named tool')", "no module named tool"),
        (
            "import sys; print('x.cu(3): error'); print('error: it does not compile', file=sys.stderr)",
            "it does not compile",
        ),
    ],
)
def test_a_tool_that_breaks_fails_and_an_older_build_is_told_of(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "is_outdated", lambda: True)
    assert compiling.build(tmp_path, _tool(tmp_path, text)) == FAILED
    printed = capsys.readouterr().out
    assert last_figure(printed) == f"not built: {words}; what is measured is an older build"
    assert ("x.cu(3): error\n" in printed) == ("x.cu" in text)


def test_it_is_built_for_this_gpu_alone_and_must_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = _tool(tmp_path, "import os; print(os.environ['FASTVIT_CUDA_ARCHS']); print('built: /here/_fastvit_cuda.so')")
    monkeypatch.setenv("FASTVIT_CUDA_ARCHS", "80;100")
    for reason, status in (("", PASSED), ("it can't be loaded", FAILED)):
        monkeypatch.setattr(compiling, "_why_not_running", lambda reason=reason: reason)
        assert compiling.build(tmp_path, tool) == status
        printed = capsys.readouterr().out
        assert printed.startswith("90a\n") and last_figure(printed).startswith("built for sm_90a in ")
        assert reason in last_figure(printed)


@pytest.mark.parametrize(
    ("what", "notes", "is_outdated", "reasons", "status"),
    [
        ("it loads", {"sources": "1"}, False, [""], SKIPPED),
        ("of other sources", {"sources": "1"}, True, [""], PASSED),
        ("it came without its notes", {}, False, [""], PASSED),
        ("it does not load", {"sources": "1"}, False, ["undefined symbol", ""], PASSED),
        ("nor does what is built", {"sources": "1"}, False, ["undefined symbol", "undefined symbol"], FAILED),
    ],
)
def test_a_library_that_came_with_the_tree_is_built_anew_only_where_it_is_of_no_use(
    what: str, notes: dict[str, Any], is_outdated: bool, reasons: list[str], status: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cuda, "why_missing", lambda: "")
    monkeypatch.setattr(cuda, "build_info", lambda: {"architectures": ["90a"], **notes})
    monkeypatch.setattr(cuda, "is_outdated", lambda: is_outdated)
    monkeypatch.setattr(compiling, "_why_not_running", lambda: reasons.pop(0))
    assert compiling.build(tmp_path, _tool(tmp_path, "print('built: /here/_fastvit_cuda.so')")) == status
    printed = capsys.readouterr().out
    assert ("not needed: it loads, built for sm_90a" in last_figure(printed)) == (status == SKIPPED) and not reasons
    assert ("the library that is here can't run: undefined symbol" in printed) == ("does" in what)


def test_a_library_is_loaded_anew_once_another_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found out about the first is forgotten."""
    words = ["cannot open shared object file", ""]

    def load(path: str) -> None:
        if words.pop(0):
            raise OSError("cannot open shared object file")

    monkeypatch.setattr(cuda, "why_missing", lambda: "")
    monkeypatch.setattr(cuda, "_why_not_compiled_for", lambda major, minor: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "load_library", load)
    assert "cannot open" in compiling._why_not_running() and not compiling._why_not_running()
    cuda.why_unavailable.cache_clear()
    cuda.why_not_loaded.cache_clear()


def test_without_a_checkout_it_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiling.build(tmp_path, tmp_path / "tool.py") == SKIPPED
    assert "run this from a checkout" in last_figure(capsys.readouterr().out)


def test_installing_on_a_gpu_builds_nothing_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extension is the campaign's, which goes on without it."""
    spec = importlib.util.spec_from_file_location("gpu_env", ROOT / "tools" / "gpu_env.py")
    assert spec is not None and spec.loader is not None
    found: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
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


# warm


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_warming_compiles_what_a_launch_would_look_for_and_names_what_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a driver that only names its GPU, an entry compiles along the path of a launch; without any, none does."""
    pytest.importorskip("triton")
    monkeypatch.setattr(compiling, "PROCESSES", 1)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    entries = manifest.entries()
    every = len(entries)  # the first alone
    assert compiling.warm(tmp_path, every, 90) == PASSED
    printed = capsys.readouterr().out
    assert last_figure(printed) == "1 of 1 kernels compiled" and list(tmp_path.rglob("*.cubin"))
    assert set(said(printed, "kernel")) == {compiling.EMULATION, entries[0].name}
    assert compiling.warm(tmp_path, every) == FAILED
    printed = capsys.readouterr().out
    assert last_figure(printed) == "0 of 1 kernels compiled" and f"\n{entries[0].name}: " in printed


def test_what_is_compiled_is_loaded_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pool of one, in this process, and a kernel of which Triton says what it takes once it is loaded."""
    pytest.importorskip("triton")

    class Kernel:
        def _init_handles(self) -> None:
            if not fits:
                raise RuntimeError("out of resource: shared memory")
            self.n_regs, self.n_spills = 168, 4

    about = {"name": "kernel", "pointers": (), "constants_by_name": {"BLOCK_M": 64}, "num_warps": 4, "num_stages": 2}
    entries, given = [SimpleNamespace(**about, options=lambda target: {"num_warps": 4, "maxnreg": target})], []

    def warm_up(grid: tuple[int, ...], **options: Any) -> Kernel:
        given.append(options)
        return Kernel()

    function = SimpleNamespace(params=[], warmup=warm_up)
    monkeypatch.setattr(manifest, "entries", lambda: entries)
    monkeypatch.setattr(launch, "jit_function", lambda entry: function)
    monkeypatch.setattr(launch, "target_of", {torch.device("cuda"): 80}.__getitem__)
    monkeypatch.setattr(compiling, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    monkeypatch.setattr(compiling, "_warm_emulation", dict)
    monkeypatch.setattr(compiling, "_pretend", lambda target: None)
    for target, fits, status in ((90, True, PASSED), (0, True, PASSED), (0, False, FAILED)):
        assert compiling.warm(tmp_path, target=target) == status
        printed = capsys.readouterr().out
        assert set(said(printed, "kernel")) == {entries[0].name, compiling.EMULATION}
        assert ["shared memory" in error for error in said(printed, "error")] == ([] if fits else [True])
        assert [*said(printed, "n_regs"), *said(printed, "n_spills")] == ([] if target or not fits else [168, 4])
        options = {"BLOCK_M": 64, "num_warps": 4, "maxnreg": target or 80}
        assert given.pop() == options, "what a launch on such a GPU is given too"
