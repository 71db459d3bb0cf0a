"""The build of the library for the processor: what it heeds, what it compiles, and what it says where it does not."""

from __future__ import annotations

import re
from pathlib import Path

import build_extension
import build_native
import pytest
from build_extension import SOURCES, BuildError, Toolchain

TOOLCHAIN = Toolchain("/cxx", ("/ninja",), Path("/site/torch"))


def test_every_op_is_compiled_for_every_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_native.platform, "machine", lambda: "x86_64")
    library = build_native.native_library(TOOLCHAIN)
    ops = [path.name for path in sorted((SOURCES / "cpu").glob("*.cpp"))]
    for name in ("portable", "avx2", "avx512", "avx512bf16"):
        assert [path.name for rule, path, _ in library.objects if rule == name] == ops
        assert ("-DFASTVIT_ISA_IS_FIRST" in library.rules[name]) == (name == "portable")
    # What is for every processor comes first, and of the binding what there are ops for.
    first = [path for rule, path, _ in library.objects[: len(ops) + 2]]
    assert {path.name for path in first if path.parent.name == "torch"} == set(ops)
    assert {path.name for path in first if path.parent.name == "runtime"} == {"isa.cpp", "threads.cpp"}
    assert len(
        {line for line in build_extension.ninja_file(library).splitlines() if line.startswith("build cpu.")}
    ) == (4 * len(ops) + 2)


def test_other_machines_have_the_portable_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_native.platform, "machine", lambda: "aarch64")
    assert build_native.native_library(TOOLCHAIN).info["instruction_sets"] == ["portable"]


def test_what_is_included_is_known(tmp_path: Path) -> None:
    known = {path.resolve() for path in build_native.texts(SOURCES)}
    for path in known:
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            target = (path.parent / included).resolve()
            other = path.name == "primitives.cpp" or path.name in ("device_host.h", "device_cuda.h")
            assert target in known or other, f"{path.name} includes {included}"


@pytest.mark.parametrize(("mode", "said"), [("0", "it was left out: FASTVIT_BUILD_NATIVE=0"), ("yes", "")])
def test_modes(mode: str, said: str, tmp_path: Path) -> None:
    variables = {"FASTVIT_BUILD_NATIVE": mode}
    if said:
        assert build_native.build_native(tmp_path, variables) == said
        assert build_extension.read_info(tmp_path / build_native.INFO) == {"built": False, "reason": said}
    else:
        with pytest.raises(BuildError, match="FASTVIT_BUILD_NATIVE='yes': accepted are auto, 0, 1"):
            build_native.build_native(tmp_path, variables)


def test_what_does_not_compile_is_an_error_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> bool:
        raise BuildError("it does not compile")

    monkeypatch.setattr(build_native, "build", fail)
    monkeypatch.setattr(build_native, "plan", lambda environment: (TOOLCHAIN, ""))
    assert build_native.build_native(tmp_path, {}).startswith("it did not compile where FastViT was installed")
    assert "did not compile" in str(build_extension.read_info(tmp_path / build_native.INFO)["reason"])
    with pytest.raises(BuildError, match="it does not compile"):
        build_native.build_native(tmp_path, {"FASTVIT_BUILD_NATIVE": "1"})


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_extension, "_cxx", lambda: None)
    assert "there was no C++ compiler" in build_native.build_native(tmp_path, {})
    with pytest.raises(BuildError, match="FASTVIT_BUILD_NATIVE=1, but there is no C\\+\\+"):
        build_native.build_native(tmp_path, {"FASTVIT_BUILD_NATIVE": "1"})
