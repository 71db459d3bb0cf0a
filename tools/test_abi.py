"""Run the tests of the binding with one binary under the oldest and the newest torch that it is made for.

    python tools/test_abi.py [VERSION ...]

The library over emulated kernels is built once, against the headers of the running interpreter's torch. Each version is
installed into an environment of its own, in build/abi/, by pip as it is configured here; PIP_INDEX_URL names another
index, such as PyTorch's own, whose builds for the CPU are a tenth as large.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import build_extension

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "abi"
VERSIONS = ("2.11", "2.14")


def main(versions: Sequence[str]) -> int:
    """The exit code: 1 if the tests fail under one of the versions."""
    toolchain, missing = build_extension.find_toolchain(cuda=False)
    if toolchain is None:
        print(f"there is no {'; no '.join(missing)}")
        return 1
    library = FOLDER / "fastvit_host.so"
    build_extension.build(build_extension.host_library(toolchain), library)
    failed = [version for version in versions if not passes(environment(version), library)]
    print(f"built against {toolchain.versions[1]}; passed under: {', '.join(v for v in versions if v not in failed)}")
    if failed:
        print(f"FAILED under torch {', '.join(failed)}")
    return 1 if failed else 0


def environment(version: str) -> Path:
    """The interpreter of an environment with that torch, and with pytest."""
    folder = FOLDER / f"torch-{version}"
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.exists():
        print(f"installing torch {version} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", "--no-compile", f"torch=={version}.*", "pytest>=8"]
        subprocess.run(command, check=True)
        stamp.touch()
    return python


def passes(python: Path, library: Path) -> bool:
    """Whether the tests of the binding pass with the library in that environment."""
    print(subprocess.check_output([python, "-c", "import torch; print('torch', torch.__version__)"], text=True), end="")
    # The other tests' conftest.py wants fastvit and more.
    command = [str(python), "-m", "pytest", "-q", "--confcutdir=tests/cuda", "-p", "no:cacheprovider"]
    variables = {**os.environ, "FASTVIT_HOST_LIBRARY": str(library)}
    tests = sorted((ROOT / "tests" / "cuda").glob("test_binding*.py"))
    done = subprocess.run([*command, *map(str, tests)], cwd=ROOT, env=variables, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or VERSIONS))
