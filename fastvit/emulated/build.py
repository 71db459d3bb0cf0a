"""Compiles the emulated kernels into a Python module, once for each state of their sources.

Needs a C++ compiler and pybind11, nothing of CUDA.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from fastvit.files import written_whole

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
# No warnings: nobody reads them where this is built, and every compiler has its own. tests/emulated reads them.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden")
DEFINES = ("-DFASTVIT_HAS_SM90A",)  # the kernels of every GPU


def why_unavailable() -> str:
    """The reason why the emulated kernels can't be built here, "" if they can."""
    if not (SOURCES / "emulated").exists():
        return "it is built from a checkout of the repository, which this installation is not"
    if importlib.util.find_spec("fcntl") is None:
        return "it can be built on Linux and macOS alone"
    if compiler() is None:
        return "it needs a C++ compiler: c++, g++ or clang++"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return ""


@lru_cache
def compiler() -> str | None:
    """$CXX, or the first C++ compiler found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


@lru_cache
def library() -> ModuleType:
    """The module for the sources of this checkout.

    Raises:
        RuntimeError: it can't be built here; the message says why, or shows what the compiler said.
    """
    reason = why_unavailable()
    if reason:
        raise RuntimeError(f"the emulated kernels can't be built: {reason}")
    return build(units_of(SOURCES), cache_folder())


def is_built() -> bool:
    """Whether `library` need not compile anything."""
    return all(object_of(unit, cache_folder()).exists() for unit in units_of(SOURCES))


def units_of(sources: Path) -> list[Path]:
    """The files of csrc/ that are compiled."""
    return [*sorted(sources.glob("*.cu")), sources / "emulated" / "binding.cpp"]


def build(units: Sequence[Path], folder: Path, *, few_types: bool = False) -> ModuleType:
    """Compile files of csrc/, or of a changed copy, into `folder`, or load what was compiled from the same texts.

    With `few_types` there are kernels for bfloat16 and float32 alone, which compile in half the time.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda unit: _compiled(unit, folder, few_types), units))
    name = f"fastvit_emulated_{_digest(*(path.name.encode() for path in objects))}"
    target = folder / (name + importlib.machinery.EXTENSION_SUFFIXES[0])
    if not target.exists():
        # Python knows an extension module by its name, so every build has one of its own.
        _run(["-shared", f"-Wl,--defsym=PyInit_{name}=PyInit_fastvit_emulated", *map(str, objects)], target)
    loader = importlib.machinery.ExtensionFileLoader(name, str(target))
    spec = importlib.util.spec_from_file_location(name, target, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compiled(unit: Path, folder: Path, few_types: bool) -> Path:
    """The object file of a source, compiled if it is not there."""
    import pybind11

    target = object_of(unit, folder, few_types=few_types)
    with _alone(target):
        if not target.exists():
            language = ["-x", "c++"] if unit.suffix == ".cu" else []
            paths = [pybind11.get_include(), sysconfig.get_path("include")] if unit.suffix == ".cpp" else []
            defines = _defines(few_types)
            _run([*defines, *(f"-isystem{path}" for path in paths), "-c", *language, str(unit)], target)
    return target


def object_of(unit: Path, folder: Path, *, few_types: bool = False) -> Path:
    """Where the object file of a source is kept: named after the text of all that it includes."""
    seen: dict[Path, bytes] = {}
    _read(unit, seen)
    return folder / f"{unit.stem}_{_digest(*seen.values(), *map(str.encode, _defines(few_types)))}.o"


def _defines(few_types: bool) -> list[str]:
    return [*DEFINES, "-DFASTVIT_FEW_TYPES"] if few_types else [*DEFINES]


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Inside the block no other process compiles the same file."""
    import fcntl  # not on every system that the package can be imported on

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_suffix(".lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)


def _read(path: Path, seen: dict[Path, bytes]) -> None:
    """Add the texts of a file and of what it includes from csrc/ to `seen`."""
    if path in seen or not path.exists():
        return
    seen[path] = path.read_bytes()
    for included in re.findall(rb'^#include "([^"]+)"', seen[path], re.MULTILINE):
        _read((path.parent / included.decode()).resolve(), seen)


def _digest(*texts: bytes) -> str:
    digest = hashlib.sha256(" ".join((*FLAGS, str(compiler()), sys.version)).encode())
    for text in texts:
        digest.update(text)
    return digest.hexdigest()[:16]


def _run(arguments: list[str], target: Path) -> None:
    """Run the compiler; the target appears whole or not at all, for several processes may build at once."""
    with written_whole(target) as fresh:
        command = [str(compiler()), *FLAGS, *arguments, "-o", str(fresh)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"the emulated kernels don't compile:\n{run.stderr[-4000:]}")


def cache_folder() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME or ~/.cache, fastvit/emulated."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastvit" / "emulated"
