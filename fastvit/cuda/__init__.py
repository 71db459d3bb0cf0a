"""The C++/CUDA extension: a library of kernels for NVIDIA GPUs that an installation may have, or not.

It is built from csrc/ by tools/build_extension.py, at installation or by `make extension`; it registers
`torch.ops.fastvit.patch_embed_cuda` and its companions when it is loaded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from fastvit.library import Library

LIBRARY = Library(
    "the C++/CUDA extension",
    "build_extension.py",
    "extension",
    "FASTVIT_BUILD_CUDA",
    Path(__file__).resolve().with_name("_fastvit_cuda.so"),
)
why_missing, build_info = LIBRARY.why_missing, LIBRARY.build_info
how_to_get, is_outdated = LIBRARY.how_to_get, LIBRARY.is_outdated
why_not_loaded = lru_cache(LIBRARY.why_not_loaded)  # once in a process


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


def architectures() -> tuple[str, ...]:
    """The GPU architectures that the library is compiled for: "sm_80", and "compute_80" for it and all later ones."""
    info = build_info()
    ptx = info.get("ptx")
    return (*(f"sm_{name}" for name in info.get("architectures", ())), *([f"compute_{ptx}"] if ptx else []))


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
