"""Packaging: which folder becomes which module, and the version. Everything else is in pyproject.toml.

Two folders at the top of the repository are installed under other names:

    kernels/     ->  fastvit.kernels       (Triton)
    benchmarks/  ->  fastvit.benchmarks

Neither has an ``__init__.py``. A regular package called ``kernels`` in the working directory would be imported in
place of the PyPI package of that name, which transformers uses; a folder without ``__init__.py`` yields to it.
An editable install finds the two folders through fastvit/kernels/__init__.py and fastvit/benchmarks/__init__.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
RENAMED = {"kernels": "fastvit.kernels", "benchmarks": "fastvit.benchmarks"}


def version() -> str:
    """The version stands once, in fastvit/_version.py; it is read as text so that building needs no torch."""
    text = (ROOT / "fastvit" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fastvit/_version.py: no line of the form __version__ = "1.2.3"')
    return match.group(1)


def renamed_packages() -> dict[str, str]:
    """Module name -> folder for kernels/ and benchmarks/, with every subfolder that holds Python files."""
    found = {}
    for folder, name in RENAMED.items():
        for path in [ROOT / folder, *sorted((ROOT / folder).rglob("*/"))]:
            if path == ROOT / folder or any(path.glob("*.py")):
                inner = path.relative_to(ROOT / folder).parts
                found[".".join((name, *inner))] = path.relative_to(ROOT).as_posix()
    return found


renamed = renamed_packages()
setup(
    version=version(),
    license="Apache-2.0",
    packages=sorted({*find_packages(include=["fastvit", "fastvit.*"]), *renamed}),
    package_dir={"fastvit": "fastvit", **renamed},
    package_data={"": ["py.typed", "*.json"]},
)
