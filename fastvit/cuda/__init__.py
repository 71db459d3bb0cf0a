"""The C++/CUDA extension: a library of kernels for NVIDIA GPUs that an installation may have, or not.

It is built from csrc/ by tools/build_extension.py, at installation or by `make extension`; it registers
`torch.ops.fastvit.patch_embed_cuda` and its companions when it is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().with_name("_fastvit_cuda.so")
_CHECKOUT = Path(__file__).resolve().parents[2]


@lru_cache
def why_unavailable(device_type: str) -> str:
    """The reason why the extension can't run on a device type, "" if it can; it is then loaded."""
    if device_type != "cuda":
        return "it computes on CUDA devices only"
    reason = why_missing()
    if reason:
        return f"{reason}; to get it: {how_to_get()}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _why_not_compiled_for(*torch.cuda.get_device_capability()) or why_not_loaded()


def why_missing() -> str:
    """The reason why there is no library, "" if there is one."""
    if LIBRARY.exists():
        return ""
    reason = build_info().get("reason")
    return f"the C++/CUDA extension is not built: {reason}" if reason else "the C++/CUDA extension is not built"


@lru_cache
def why_not_loaded() -> str:
    """Load the library, once in a process. The reason why it can't be, "" if it is loaded."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        # torch wraps what the system's loader said.
        return f"{LIBRARY} can't be loaded into torch {torch.__version__}: {error.__cause__ or error}"
    return ""


def build_info() -> dict[str, Any]:
    """What the build wrote beside the library: "architectures" and "ptx", or "reason"; {} where nothing was built."""
    try:
        return dict(json.loads(LIBRARY.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def architectures() -> tuple[str, ...]:
    """The GPU architectures that the library is compiled for: "sm_80", and "compute_80" for it and all later ones."""
    info = build_info()
    ptx = info.get("ptx")
    return (*(f"sm_{name}" for name in info.get("architectures", ())), *([f"compute_{ptx}"] if ptx else []))


def how_to_get() -> str:
    """The command that builds the extension for this installation."""
    if (_CHECKOUT / "tools" / "build_extension.py").exists():
        return f"make -C {_CHECKOUT} extension"
    return "FASTVIT_BUILD_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall PATH_TO_FASTVIT'S_SOURCES"


def is_outdated() -> bool:
    """Whether the library was built from other sources than those of the checkout it is in."""
    built_from = build_info().get("sources")
    path = _CHECKOUT / "tools" / "build_extension.py"
    spec = importlib.util.spec_from_file_location("fastvit_build_extension", path) if path.exists() else None
    if built_from is None or not LIBRARY.exists() or spec is None or spec.loader is None:
        return False
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # where its dataclasses look for their module
    spec.loader.exec_module(tool)
    return bool(tool.sources_digest() != built_from)


def _why_not_compiled_for(major: int, minor: int) -> str:
    """The reason why the library has no code for a GPU, "" if it has, or if what it was built for is not known."""
    info = build_info()
    names = info.get("architectures")
    if names is None:
        return ""
    # Code runs on later GPUs of the same generation too, but not code that is for one architecture alone; PTX on all.
    for name in names:
        number = int(name.rstrip("af"))
        fits = number // 10 == major and number % 10 <= minor
        if fits and (name.isdigit() or number % 10 == minor):
            return ""
    if info.get("ptx") and int(info["ptx"]) <= 10 * major + minor:
        return ""
    compiled = ", ".join(architectures())
    return f"it is compiled for {compiled}; this GPU is sm_{major}{minor}, which FASTVIT_CUDA_ARCHS can add"
