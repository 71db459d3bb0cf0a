"""Make an environment that sees the running interpreter's packages, and install FastViT alone into it.

    python3 tools/gpu_env.py FOLDER

Needs no network. The C++/CUDA extension is left to the campaign, which goes on where it can't be built.

``venv --system-site-packages`` would see the packages of the base interpreter only, and so none of them where python3
is itself in a virtual environment; a .pth file names them in either case, pip included.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    missing = [name for name in ("torch", "setuptools", "pip") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{sys.executable} has no {' and no '.join(missing)}; name a Python that has: make gpu PYTHON=...")
        return 2
    folder = Path(sys.argv[1]).resolve()
    venv.create(folder, system_site_packages=True, with_pip=False, clear=True)
    python = folder / "bin" / "python"
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outside = [path for path in sys.path if path and Path(path).name in ("site-packages", "dist-packages")]
    outside += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    lines = "".join(f"{path}\n" for path in dict.fromkeys(outside))
    (Path(inside.stdout.strip()) / "outer_packages.pth").write_text(lines, encoding="utf-8")
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "--editable", str(ROOT)]
    return subprocess.run(command, env={**os.environ, "FASTVIT_BUILD_CUDA": "0"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
