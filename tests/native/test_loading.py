"""fastvit.native: when it is chosen, why it can't be, and how to get it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvit import backend, functional, native
from fastvit.backend import launch_counts, reset_launch_counts, resolve, use_backend
from fastvit.cpu import gemm
from fastvit.demo import environment

CACHED = (native.why_unavailable, native.why_not_loaded, backend._native_ops, backend.implementation)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the library is looked for, in this test: there is none yet."""
    monkeypatch.setattr(native.LIBRARY, "path", tmp_path / "_fastvit_native.so")
    for function in CACHED:
        function.cache_clear()
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the variable says, nobody has named a backend."""
    monkeypatch.setattr(backend, "_environment", None)


def added(**arguments: str) -> torch.Tensor:
    return functional.add_position(torch.ones(1, 4, 8), torch.ones(4, 8), **arguments)


def embedded(dtype: torch.dtype = torch.float32) -> str:
    """Run patch_embed; the backend that did it."""
    reset_launch_counts()
    functional.patch_embed(torch.randn(2, 3, 8, 8, dtype=dtype), torch.randn(8, 3, 4, 4, dtype=dtype))
    return next((name for _, name in launch_counts()), "reference")


# When it is chosen


def test_it_is_what_runs_on_a_cpu(library: Path, unforced: None) -> None:
    assert {resolve(None, "cpu", False, op) for op in native.ops()} == {"native"}
    tokens = torch.ones(1, 4, 8, requires_grad=True)
    functional.add_position(tokens, torch.ones(4, 8, requires_grad=True)).sum().backward()
    assert launch_counts() == {("add_position", "native"): 1, ("add_position_backward", "native"): 1}
    assert embedded() == "native"


def test_whoever_names_another_has_it(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added(backend="cpu")
    with use_backend("cpu"):
        added()
    monkeypatch.setattr(backend, "_environment", "cpu")  # FASTVIT_BACKEND
    added()
    assert launch_counts() == {("add_position", "cpu"): 3}


def test_float64_and_other_devices_are_not_its(library: Path, unforced: None) -> None:
    assert embedded(torch.float64) == "reference"
    assert resolve(None, "cpu", True, "add_position") == resolve(None, "mps", False, "add_position") == "reference"
    assert resolve(None, "meta", False, "add_position") == "cpu"


def test_the_portable_set_is_not_chosen(library: Path, unforced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_set", lambda: "portable")
    added()
    assert launch_counts() == {("add_position", "cpu"): 1}


def test_bfloat16_is_left_to_tiles(library: Path, unforced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for has_tiles, expected in ((True, "cpu"), (False, "native")):
        monkeypatch.setattr(gemm, "has_bfloat16_tiles", lambda has_tiles=has_tiles: has_tiles)
        assert embedded(torch.bfloat16) == expected
        assert embedded() == "native"
    monkeypatch.setattr(gemm, "has_bfloat16_tiles", lambda: True)
    functional.add_position(torch.ones(1, 4, 8).bfloat16(), torch.ones(4, 8))  # no product
    assert launch_counts()["add_position", "native"] == 1


class Embed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 3, 4, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.patch_embed(images, self.weight)


def test_compiled_code_takes_it(library: Path, unforced: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Embed(), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    assert launch_counts() == {("patch_embed", "native"): 1, ("patch_embed_backward", "native"): 1}


@pytest.mark.parametrize("how", ["strict", "not strict", "traced"])
def test_a_program_that_may_run_elsewhere_does_not_name_it(how: str, library: Path, unforced: None) -> None:
    module, images = Embed(), torch.randn(2, 3, 8, 8)
    program = torch.jit.trace(module, (images,)) if how == "traced" else None
    if program is None:
        program = torch.export.export(module, (images,), strict=how == "strict").module()
    reset_launch_counts()
    torch.testing.assert_close(program(images), module(images))
    assert launch_counts() == {("patch_embed", "cpu"): 1, ("patch_embed", "native"): 1}


# Where it can't be


def test_without_a_library_the_cpu_backend_runs(folder: Path, unforced: None) -> None:
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


def test_a_program_that_names_it_without_a_library_says_so(folder: Path) -> None:
    arguments = torch.ones(1, 4, 8), torch.ones(4, 8), None, torch.float32
    with pytest.raises(RuntimeError, match="'native', which a program names, can't run here: the library for the proc"):
        torch.ops.fastvit.add_position(*arguments, "native")


def test_an_op_that_the_library_has_not_is_not_chosen(
    library: Path, unforced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    native.LIBRARY.path.write_bytes(b"")
    (folder / "_fastvit_native.json").write_text(json.dumps({"sources": "others"}))
    assert native.is_outdated()
    assert any("native" in line for line in environment.extension_warnings())


def test_info_names_the_instruction_set(library: Path) -> None:
    found = environment.native_library()
    assert found["library"] == str(library) and found["instruction_set"] == native.instruction_set()


def test_info_says_what_is_chosen(library: Path, unforced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment._summary(environment.chosen("cpu")) == "native"
    monkeypatch.setattr(native, "ops", lambda: ("add_norm", "patch_embed"))
    backend._native_ops.cache_clear()
    try:
        found = environment.chosen("cpu")
        assert {op for op, name in found.items() if name == "native"} == {"add_norm", "patch_embed"}
        assert environment._summary(found).startswith("native: add_norm, patch_embed; cpu: add_position, ")
    finally:
        backend._native_ops.cache_clear()
    monkeypatch.setattr(backend, "_environment", "cuda")
    assert "FASTVIT_BACKEND: 'cuda' can't run on device 'cpu'" in environment._summary(environment.chosen("cpu"))
