"""Compiles the emulated kernels into a Python module, once for each state of their sources.

Needs a C++ compiler and pybind11, nothing of CUDA.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas")
# What each of the two sources is compiled from. The binding takes longer than all kernels; it sees none of them.
SEEN = {
    "kernels": ("emulated/kernels.*", "**/*.h"),
    "binding": ("emulated/binding.cpp", "emulated/kernels.h", "parameters.h", "simt/**/*.h"),
}


def why_unavailable() -> str:
    """The reason why the emulated kernels can't be built here, "" if they can."""
    if not (SOURCES / "emulated").exists():
        return "it is built from a checkout of the repository, which this installation is not"
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
    return build(SOURCES, cache_folder())


def build(sources: Path, folder: Path, *, few_types: bool = False) -> ModuleType:
    """Compile csrc/ or a changed copy of it into `folder`, or load what was compiled from the same text before.

    With `few_types` the tensor-core kernels are there for bfloat16 alone, which compiles several times faster.
    """
    defines = ["-DFASTVIT_FEW_TYPES"] if few_types else []
    objects = [_compiled(sources, name, folder, defines if name == "kernels" else []) for name in SEEN]
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


def _compiled(sources: Path, name: str, folder: Path, defines: list[str]) -> Path:
    """The object file of a source in csrc/emulated/."""
    import pybind11

    paths = sorted(path for pattern in SEEN[name] for path in sources.glob(pattern))
    target = folder / f"{name}_{_digest(*(path.read_bytes() for path in paths), *map(str.encode, defines))}.o"
    if not target.exists():
        includes = [pybind11.get_include(), sysconfig.get_path("include")] if name == "binding" else []
        _run([*defines, "-c", str(sources / f"emulated/{name}.cpp"), *(f"-isystem{path}" for path in includes)], target)
    return target


def _digest(*texts: bytes) -> str:
    digest = hashlib.sha256(" ".join((*FLAGS, str(compiler()), sys.version)).encode())
    for text in texts:
        digest.update(text)
    return digest.hexdigest()[:16]


def _run(arguments: list[str], target: Path) -> None:
    """Run the compiler; the target appears whole or not at all, for several processes may build at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch) / target.name
        command = [str(compiler()), *FLAGS, *arguments, "-o", str(partial)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"the emulated kernels don't compile:\n{run.stderr[-4000:]}")
        partial.replace(target)


def cache_folder() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME or ~/.cache, fastvit/emulated."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastvit" / "emulated"
