"""A compiled library of ops that an installation may have, or not: why it is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass
class Library:
    """What messages call it, the file that builds it in a checkout, `make`'s target, the variable of an install, and
    where it lies."""

    about: str
    tool: str
    target: str
    variable: str
    path: Path
    checkout: Path = CHECKOUT

    def why_missing(self) -> str:
        """The reason why there is no library, "" if there is one."""
        if self.path.exists():
            return ""
        reason = self.build_info().get("reason")
        return f"{self.about} is not built: {reason}" if reason else f"{self.about} is not built"

    def why_not_loaded(self) -> str:
        """Load the library. The reason why it can't be, "" if it is loaded."""
        try:
            torch.ops.load_library(str(self.path))
        except OSError as error:
            # torch wraps what the system's loader said.
            return f"{self.path} can't be loaded into torch {torch.__version__}: {error.__cause__ or error}"
        return ""

    def build_info(self) -> dict[str, Any]:
        """What the build wrote beside the library: of what it was built, or "reason"; {} where nothing was built."""
        try:
            return dict(json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def how_to_get(self) -> str:
        """The command that builds the library for this installation."""
        if (self.checkout / "tools" / self.tool).exists():
            return f"make -C {self.checkout} {self.target}"
        return (
            f"{self.variable}=1 pip install --no-build-isolation --no-deps --force-reinstall PATH_TO_FASTVIT'S_SOURCES"
        )

    def is_outdated(self) -> bool:
        """Whether the library was built from other sources than those of the checkout it is in."""
        built_from = self.build_info().get("sources")
        tool = self.checkout / "tools" / self.tool
        if built_from is None or not self.path.exists() or not tool.exists():
            return False
        return bool(_module(tool).sources_digest() != built_from)


def _module(path: Path) -> Any:
    """The module of a file that may import those beside it."""
    spec = importlib.util.spec_from_file_location(f"fastvit_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
