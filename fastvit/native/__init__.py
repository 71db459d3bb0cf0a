"""The ops in C++ for the processor: a library that an installation may have, or not.

It is built from csrc/cpu/ by tools/build_native.py, at installation or by `make native`, for several instruction sets,
of which the best that the processor has is chosen when it is first used, or the one that FASTVIT_CPU_ISA names. It
registers `torch.ops.fastvit_native.add_position_cuda` and its companions, by the names of the binding that both
libraries share, when it is loaded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastvit.library import Library

LIBRARY = Library(
    "the library for the processor",
    "build_native.py",
    "native",
    "FASTVIT_BUILD_NATIVE",
    Path(__file__).resolve().with_name("_fastvit_native.so"),
)
why_missing, build_info = LIBRARY.why_missing, LIBRARY.build_info
how_to_get, is_outdated = LIBRARY.how_to_get, LIBRARY.is_outdated
why_not_loaded = lru_cache(LIBRARY.why_not_loaded)  # once in a process


@lru_cache
def why_unavailable(device_type: str) -> str:
    """The reason why the library can't run on a device type, "" if it can; it is then loaded.

    Raises:
        RuntimeError: FASTVIT_CPU_ISA names no instruction set of the library, or one that the processor lacks.
    """
    if device_type != "cpu":
        return "it computes on the CPU only"
    reason = why_missing()
    if reason:
        return f"{reason}; to get it: {how_to_get()}"
    reason = why_not_loaded()
    if not reason:
        instruction_set()
    return reason


@lru_cache
def instruction_set() -> str:
    """The name of the one that the loaded library runs with: portable, avx2, avx512 or avx512bf16.

    Raises:
        RuntimeError: as :func:`why_unavailable`.
    """
    with _disable_current_modes():  # a tracer must not note it
        return str(torch.ops.fastvit_native.instruction_set())


def uses_the_processor() -> bool:
    """Whether the loaded library runs with what the processor has beyond the least of its kind, as PyTorch does."""
    return instruction_set() != "portable"


def ops() -> tuple[str, ...]:
    """The ops that the library has."""
    return tuple(build_info().get("ops", ()))
