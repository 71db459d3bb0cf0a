"""What an import brings in, and what it must leave alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("triton", "timm", "torchvision", "transformers", "matplotlib", "sklearn", "rich", "typer", "torch._dynamo")


def run(code: str, cwd: Path, **variables: str) -> str:
    """What a fresh interpreter prints, started in `cwd`."""
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_fastvit_brings_in_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, torch, fastvit\n"
        f"print([name for name in {HEAVY} if name in sys.modules], torch.cuda.is_initialized())"
    )
    assert run(code, tmp_path) == "[] False"


@pytest.mark.parametrize("inside_repository", [True, False])
def test_renamed_folders_are_subpackages(tmp_path: Path, inside_repository: bool) -> None:
    code = "import fastvit.kernels.manifest as m, fastvit.benchmarks as b; print(m.__name__, b.__name__)"
    assert run(code, ROOT if inside_repository else tmp_path) == "fastvit.kernels.manifest fastvit.benchmarks"


@pytest.mark.parametrize("name", ["kernels", "benchmarks"])
def test_our_folder_does_not_hide_a_package_of_that_name(tmp_path: Path, name: str) -> None:
    # transformers imports the PyPI package `kernels`; Python looks into the working directory first.
    package = tmp_path / "site" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHO = 'the package from the registry'\n", encoding="utf-8")
    code = f"import sys; assert sys.path[0] == '', sys.path; import {name}; print({name}.WHO)"
    variables = {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": ""}
    assert run(code, ROOT, **variables) == "the package from the registry"


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    import fastvit

    assert fastvit.__version__ == version("fastvit")
