"""fastvit.cuda: why the extension can't be used, and how to get it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

cuda = pytest.importorskip("fastvit.cuda")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for, in this test: there is none yet."""
    cached = cuda.why_unavailable, cuda.why_not_loaded
    monkeypatch.setattr(cuda.LIBRARY, "path", tmp_path / "_fastvit_cuda.so")
    forget(*cached)
    yield tmp_path
    forget(*cached)


def forget(*functions: Any) -> None:
    """So that the next call finds out again."""
    for function in functions:
        function.cache_clear()


def describe(folder: Path, **info: Any) -> None:
    (folder / "_fastvit_cuda.json").write_text(json.dumps(info), encoding="utf-8")


def test_other_devices_are_refused() -> None:
    assert cuda.why_unavailable("cpu") == "it computes on CUDA devices only"


def test_a_missing_library_says_how_to_get_it(folder: Path) -> None:
    assert cuda.why_unavailable("cuda") == (
        f"the C++/CUDA extension is not built; to get it: make -C {Path(__file__).resolve().parents[2]} extension"
    )
    describe(folder, built=False, reason="where FastViT was installed there was no nvcc")
    forget(cuda.why_unavailable)
    reason = cuda.why_unavailable("cuda")
    assert reason.startswith("the C++/CUDA extension is not built: where FastViT was installed there was no nvcc; to g")


def test_without_a_checkout_the_command_is_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda.LIBRARY, "checkout", tmp_path)
    assert cuda.how_to_get().startswith("FASTVIT_BUILD_CUDA=1 pip install --no-build-isolation ")
    assert not cuda.is_outdated()


def test_what_is_no_library_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.LIBRARY.path.write_bytes(b"half of a libra")
    reason = cuda.why_not_loaded()
    assert str(cuda.LIBRARY.path) in reason and torch.__version__ in reason and "file too short" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cuda.why_unavailable("cuda") == reason


def test_a_library_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.LIBRARY.path.write_bytes(b"")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.why_unavailable("cuda") == "no CUDA device"


@pytest.mark.parametrize(
    ("names", "ptx", "gpu", "runs"),
    [
        (["80"], "80", (8, 0), True),
        (["80"], "80", (12, 0), True),  # compiled at run time
        (["80"], "", (8, 9), True),  # a later GPU of the same generation
        (["86"], "", (8, 0), False),
        (["80"], "", (9, 0), False),
        (["90a"], "", (9, 0), True),
        (["100a"], "", (10, 3), False),  # code for one architecture alone
        (["90a", "100"], "100", (10, 3), True),
        (["90a", "100"], "100", (8, 0), False),
    ],
)
def test_the_gpu_must_be_among_the_architectures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], ptx: str, gpu: tuple[int, int], runs: bool
) -> None:
    cuda.LIBRARY.path.write_bytes(b"")
    describe(folder, built=True, architectures=names, ptx=ptx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(cuda, "why_not_loaded", lambda: "")
    reason = cuda.why_unavailable("cuda")
    assert (reason == "") == runs
    assert runs or f"this GPU is sm_{gpu[0]}{gpu[1]}" in reason and f"sm_{names[0]}" in reason


def test_a_library_of_other_sources_is_outdated(folder: Path, tool: Any) -> None:
    describe(folder, built=True, architectures=["80"], ptx="80", sources=tool.sources_digest())
    assert not cuda.is_outdated()  # there is no library at all
    cuda.LIBRARY.path.write_bytes(b"")
    assert not cuda.is_outdated()
    describe(folder, built=True, architectures=["80"], ptx="80", sources="others")
    assert cuda.is_outdated()
    assert cuda.architectures() == ("sm_80", "compute_80")


def test_info_shows_the_extension(folder: Path) -> None:
    environment = pytest.importorskip("fastvit.demo.environment")
    describe(folder, built=False, reason="there was no nvcc")
    found = environment.extension()
    assert found["library"] == "" and found["why_missing"].endswith("there was no nvcc")
    assert "make" in found["how_to_get"]
    assert environment.compiled_targets()["cuda"] == "none"
    assert not [line for line in environment.extension_warnings() if "CUDA" in line]
    cuda.LIBRARY.path.write_bytes(b"")
    describe(folder, built=True, architectures=["90a"], ptx="", sources="others")
    assert environment.extension() == {"library": str(cuda.LIBRARY.path), "why_missing": "", "how_to_get": ""}
    assert environment.compiled_targets()["cuda"] == "sm_90a"
    assert "make" in environment.extension_warnings()[0]
