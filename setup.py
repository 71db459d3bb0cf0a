"""Packaging: which folder becomes which module, and the compiled libraries. The rest: pyproject.toml.

Two folders at the top of the repository are installed under other names:

    kernels/     ->  fastvit.kernels       (Triton)
    benchmarks/  ->  fastvit.benchmarks

Neither has an ``__init__.py``. A regular package called ``kernels`` in the working directory would be imported in
place of the PyPI package of that name, which transformers uses; a folder without ``__init__.py`` yields to it.
An editable install finds the two folders through fastvit/kernels/__init__.py and fastvit/benchmarks/__init__.py.

Where ninja, a C++ compiler and torch's headers are, tools/build_native.py builds the ops for the processor, and where
nvcc is too, tools/build_extension.py the C++/CUDA extension. Both tell the variables that they heed.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.build import build

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
RENAMED = {"kernels": "fastvit.kernels", "benchmarks": "fastvit.benchmarks"}

sys.path.insert(0, str(ROOT / "tools"))
import build_extension  # noqa: E402
import build_native  # noqa: E402

# What builds a library into a folder, and the module that tells its name and place.
LIBRARIES = {
    build_native: build_native.build_native,
    build_extension: build_extension.build_extension,
}


def renamed_packages() -> dict[str, str]:
    """Module name -> folder for kernels/ and benchmarks/, with every subfolder that holds Python files."""
    found = {}
    for folder, name in RENAMED.items():
        for path in [ROOT / folder, *sorted((ROOT / folder).rglob("*/"))]:
            if path == ROOT / folder or any(path.glob("*.py")):
                inner = path.relative_to(ROOT / folder).parts
                found[".".join((name, *inner))] = path.relative_to(ROOT).as_posix()
    return found


@lru_cache
def are_built() -> bool:
    """Whether a library will be part of this; a variable without a meaning ends everything."""
    try:
        return any([tool.plan()[0] is not None for tool in LIBRARIES])
    except build_extension.BuildError as error:
        raise SystemExit(f"error: {error}") from None


class FastViT(Distribution):
    """Bound to a platform where it will have a library."""

    def has_ext_modules(self) -> bool:
        return are_built()


class BuildLibraries(Command):
    """The libraries, and what is to be known of each, in their packages: of the wheel, or of the tree in an editable
    one."""

    user_options: list[tuple[str, str, str]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        for tool, build_into in LIBRARIES.items():
            folder = (ROOT if self.editable_mode else Path(self.build_lib)) / tool.PACKAGE
            try:
                reason = build_into(folder)
            except build_extension.BuildError as error:
                raise SystemExit(f"error: {error}; {tool.VARIABLE}=0 installs without it") from None
            if reason:
                self.announce(f"{tool.LIBRARY} is not built: {reason}", level=2)

    def get_source_files(self) -> list[str]:
        return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        files = [Path(self.build_lib) / tool.PACKAGE / name for tool in LIBRARIES for name in (tool.INFO, tool.LIBRARY)]
        return [] if self.editable_mode else [str(path) for path in files if path.exists() or path.suffix == ".json"]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """With the libraries, after the Python files."""

    sub_commands = [*build.sub_commands, ("build_libraries", None)]


class BuildWheel(bdist_wheel):
    """The libraries know nothing of Python, so that one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


are_built()
renamed = renamed_packages()
setup(
    license="Apache-2.0",
    packages=sorted({*find_packages(include=["fastvit", "fastvit.*"]), *renamed}),
    package_dir={"fastvit": "fastvit", **renamed},
    package_data={"": ["py.typed", "*.json"]},
    exclude_package_data={f"fastvit.{tool.PACKAGE.name}": [tool.INFO] for tool in LIBRARIES},
    distclass=FastViT,
    cmdclass={"build": Build, "build_libraries": BuildLibraries, "bdist_wheel": BuildWheel},
)
