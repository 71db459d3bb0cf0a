"""fastvit.native: when it is chosen, why it can't be, and how to get it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvit import backend, functional, native
from fastvit.backend import launch_counts
from fastvit.demo import environment

CACHED = (native.why_unavailable, native.why_not_loaded, backend._native_ops)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for, in this test: there is none yet."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_fastvit_native.so")
    for function in CACHED:
        function.cache_clear()
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


def added(**arguments: str) -> torch.Tensor:
    return functional.add_position(torch.ones(1, 4, 8), torch.ones(4, 8), **arguments)


def test_it_is_chosen_where_it_is_asked_for(library: Path) -> None:
    added()
    assert launch_counts() == {("add_position", "cpu"): 1}
    added(backend="native")
    assert launch_counts()["add_position", "native"] == 1


def test_the_portable_set_is_not_chosen(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_set", lambda: "portable")
    added()
    assert launch_counts() == {("add_position", "cpu"): 1}


def test_without_a_library_the_cpu_backend_runs(folder: Path) -> None:
    added()
    assert launch_counts() == {("add_position", "cpu"): 1}
    with pytest.raises(
        RuntimeError, match="'native' can't run on device 'cpu': the library for the processor is not bu"
    ):
        added(backend="native")
    (folder / "_fastvit_native.json").write_text(json.dumps({"built": False, "reason": "there was no compiler"}))
    native.why_unavailable.cache_clear()
    reason = native.why_unavailable("cpu")
    assert "is not built: there was no compiler; to get it: make -C " in reason and reason.endswith(" native")
    found = environment.native_library()
    assert found["library"] == "" and found["why_missing"].endswith("there was no compiler")


def test_an_op_that_the_library_has_not_is_not_chosen(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ops", lambda: ("add_norm",))
    backend._native_ops.cache_clear()
    try:
        added()
        assert launch_counts() == {("add_position", "cpu"): 1}
        with pytest.raises(RuntimeError, match="'native' can't run on device 'cpu': it has no kernel for add_position"):
            added(backend="native")
    finally:
        backend._native_ops.cache_clear()


def test_every_op_of_the_library_has_its_file(library: Path) -> None:
    files = {path.stem for path in Path(native.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(native.ops())


def test_other_devices_are_refused() -> None:
    assert native.why_unavailable("cuda") == native.why_unavailable("meta") == "it computes on the CPU only"


def test_a_library_of_other_sources_is_outdated(folder: Path) -> None:
    native.LIBRARY.write_bytes(b"")
    (folder / "_fastvit_native.json").write_text(json.dumps({"sources": "others"}))
    assert native.is_outdated()
    assert any("native" in line for line in environment.extension_warnings())


def test_info_names_the_instruction_set(library: Path) -> None:
    found = environment.native_library()
    assert found["library"] == str(library) and found["instruction_set"] == native.instruction_set()
