"""Run mypy over the package as it is installed: fastvit/ with kernels/ and benchmarks/ inside it.

mypy looks for files, not for what an import finds, so it can't see that fastvit.kernels is the folder kernels/.
A tree of links in build/ shows it the installed layout; the paths it reports are turned back into the repository's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typecheck"
RENAMED = ("kernels", "benchmarks")


def link_tree() -> None:
    """Make build/typecheck/fastvit, a folder of links."""
    package = TREE / "fastvit"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "fastvit").iterdir():
        if path.name not in (*RENAMED, "__pycache__"):
            (package / path.name).symlink_to(path)
    for name in RENAMED:
        (package / name).symlink_to(ROOT / name)


def main() -> int:
    link_tree()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "fastvit", *sys.argv[1:]]
    done = subprocess.run(
        command, cwd=TREE, env={**os.environ, "MYPYPATH": str(TREE)}, capture_output=True, text=True, check=False
    )
    for line in (done.stdout + done.stderr).splitlines():
        inner = line.removeprefix("fastvit/")
        print(inner if inner.startswith(RENAMED) else line)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
