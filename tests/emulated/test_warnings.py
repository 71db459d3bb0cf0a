"""The compiler has nothing to say of csrc/: as errors here alone, so that no warning of a newer one stops a build."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastvit.emulated import build

HERE = Path(__file__).resolve().parent
WARNINGS = ("-Wall", "-Werror", "-Wno-unknown-pragmas")  # nvcc's pragmas
UNITS = [*build.units_of(build.SOURCES), *sorted(HERE.glob("*.cpp"))]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_sources_compile_without_warnings(unit: Path) -> None:
    done = subprocess.run(_command(unit), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_warning_is_seen_in_a_template_too(tmp_path: Path) -> None:
    source = tmp_path / "unused.cu"
    source.write_text("template <class T> void f() { T unused; }\nvoid g() { f<int>(); }\n", encoding="utf-8")
    done = subprocess.run(_command(source), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode and "unused" in done.stderr


def test_a_warning_stops_no_build() -> None:
    assert not [flag for flag in build.FLAGS if flag.startswith("-W")]


def _command(unit: Path) -> list[str]:
    """Everything is instantiated and nothing translated, which takes a second a file."""
    import pybind11

    paths = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = [*build.FLAGS, *WARNINGS, *build.DEFINES, f"-I{build.SOURCES}", *paths, "-fsyntax-only"]
    return [str(build.compiler()), *flags, "-x", "c++", str(unit)]
