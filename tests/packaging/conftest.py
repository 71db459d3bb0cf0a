"""Copies of the tree, so that nothing is built in the one under test."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CONTENTS = ("fastvit", "kernels", "benchmarks", "csrc", "tools/build_extension.py", "setup.py", "pyproject.toml")
CONTENTS += ("tools/build_native.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def tool() -> Any:
    """tools/build_extension.py."""
    return load(ROOT, "build_extension")


def load(tree: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, tree / "tools" / "build_extension.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built from, and nothing that was built."""
    return copied_tree(tmp_path_factory.mktemp("source"))


def copied_tree(target: Path) -> Path:
    for name in CONTENTS:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_fastvit_*.so", "_fastvit_*.json")
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def stub_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a small csrc/, which nvcc compiles in seconds."""
    target = copied_tree(tmp_path_factory.mktemp("stub"))
    for path in (*(target / "csrc").glob("*.cu"), *(target / "csrc" / "torch").glob("*.cpp")):
        if path.name != "add_position.cpp":
            path.unlink()
    # Bindings are built of what there are kernels for, by the names of their files.
    for name, kernel in (("stub.cu", "add_position.cu"), ("stub_sm90a.cu", "stub_sm90a.cu")):
        shutil.copy(HERE / name, target / "csrc" / kernel)
    return target


@pytest.fixture(scope="session")
def stub_tool(stub_tree: Path, tool: Any) -> Any:
    """tools/build_extension.py of that tree, where everything that it takes to build is here."""
    _, missing = tool.find_toolchain()
    if missing:
        pytest.skip(f"there is no {'; no '.join(missing)}")
    return load(stub_tree, "stub_build_extension")
