"""How kernels are jitted: Triton specialises them on what their entry in the manifest says, and on nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import triton

from fastvit.kernels import interpreter

interpreter.mend()


def jit(function: Callable[..., Any], any_address: Sequence[str] = ()) -> Any:
    """A kernel whose scalars, all of them annotated with their types, may have any value.

    Args:
        function: the kernel, with `from __future__ import annotations` in its file.
        any_address: pointers that need not be aligned to 16 bytes.
    """
    annotations = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    scalars = [name for name, kind in annotations.items() if kind not in (inspect.Parameter.empty, "tl.constexpr")]
    return triton.jit(function, do_not_specialize=scalars, do_not_specialize_on_alignment=list(any_address))
