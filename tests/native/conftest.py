"""Builds of the library for the processor, and runs of them, each in a process of its own: a library is loaded once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import build_native
import pytest
from build_extension import WORK, Library, Toolchain, build

from fastvit import native
from tests.native import planted

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    """What builds, where it is here."""
    found, reason = build_native.plan({"FASTVIT_BUILD_NATIVE": "auto"})
    if found is None:
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def library() -> Path:
    """The one that the package has."""
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(reason)
    return native.LIBRARY.path


def check(library: Path, *ops: str, **environment: str) -> dict[str, Any]:
    """What checks.py finds with a library, and "set", the instruction set that it ran with.

    Raises:
        RuntimeError: it ends with an error; the message is what it said last.
    """
    command = [sys.executable, str(HERE / "checks.py"), str(library), *ops]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return dict(json.loads(done.stdout.strip().rpartition("\n")[2]))


def one_set(toolchain: Toolchain, name: str, *flags: str) -> tuple[Library, Path]:
    """The library with what every processor has, which compiles quickly, and the file that it is built into."""
    library = build_native.native_library(toolchain, flags=flags, only="portable")
    target = WORK / name / build_native.LIBRARY
    build(library, target)
    return library, target


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What shows each of a file's FAULTS, by its name, and what is wrong without one, by ""; "" for nothing. The file
    says which OPS are built, perhaps the ONLY instruction set, and its CASES."""
    file = request.module
    library = planted.build(file.FAULTS, file.OPS, tmp_path_factory.mktemp("planted"), getattr(file, "ONLY", ""))
    names = ["", *(fault.name for fault in file.FAULTS)]
    return dict(zip(names, planted.outcomes(library, len(file.FAULTS), f"{file.__name__}:CASES"), strict=True))
