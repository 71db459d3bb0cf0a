"""The wheel holds every module under its installed name, and works without the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RENAMED = ("kernels", "benchmarks")
WITHOUT = {"FASTVIT_BUILD_CUDA": "0", "FASTVIT_BUILD_NATIVE": "0"}


def python_files() -> list[str]:
    """The path in the wheel of every Python file of the package."""
    stand_ins = {f"fastvit/{name}/__init__.py" for name in RENAMED}
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastvit").rglob("*.py")} - stand_ins
    renamed = {
        "fastvit/" + path.relative_to(ROOT).as_posix() for name in RENAMED for path in (ROOT / name).rglob("*.py")
    }
    return sorted(own | renamed)


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the compiled libraries."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    variables = {**os.environ, **WITHOUT}
    done = subprocess.run([*command, "-w", out, tree], capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_without_libraries_serves_every_platform(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    assert not [name for name in archive.namelist() if name.endswith((".so", ".cu", ".h"))]
    for name, variable in (("cuda", "FASTVIT_BUILD_CUDA"), ("native", "FASTVIT_BUILD_NATIVE")):
        info = json.loads(archive.read(f"fastvit/{name}/_fastvit_{name}.json"))
        assert info == {"built": False, "reason": f"it was left out: {variable}=0"}


@pytest.mark.parametrize("variable", WITHOUT)
def test_an_unknown_mode_stops_the_build(tree: Path, variable: str) -> None:
    variables = {**os.environ, variable: "yes"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode and f"error: {variable}='yes': accepted are auto, 0, 1" in done.stderr


def test_source_distribution_has_what_a_build_takes(tree: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    variables = {**os.environ, **WITHOUT}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False, env=variables
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert names >= {*sources, "setup.py", "tools/build_extension.py", "tools/build_native.py", "kernels/launch.py"}


def test_wheel_has_every_module_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.endswith(".py")) == python_files()
    assert len(names) == len(set(names))


def test_wheel_has_types_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    assert "fastvit/py.typed" in archive.namelist()
    assert any(name.endswith("/LICENSE") for name in archive.namelist())
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "fastvit = fastvit.cli:main" in archive.read(entry_points).decode()


def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, fastvit, fastvit.kernels.manifest, fastvit.benchmarks\n"
        "t = fastvit.functional.patch_embed(torch.randint(0, 256, (1, 1, 8, 8)).byte(), torch.ones(3, 1, 4, 4))\n"
        "from fastvit.benchmarks import runner, tune\n"
        "from fastvit.validation.ops import OPS\n"
        "assert {*OPS} == set(tune.TUNED) < {*runner.SUITES, 'patch_embed_packed'}, (*OPS, *tune.TUNED)\n"
        "try:\n    import triton\nexcept ImportError:\n    pass\n"
        "else:\n    assert len(fastvit.kernels.manifest.entries()) > 100\n"
        "print(fastvit.kernels.manifest.__file__, tuple(t.shape))"
    )
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path / 'fastvit/kernels/manifest.py'} (1, 4, 3)"
