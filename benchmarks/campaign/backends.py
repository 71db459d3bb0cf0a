"""Which backends the stages hold to the truth and measure."""

from __future__ import annotations

import torch

from fastvit.backend import available_backends
from fastvit.benchmarks.problem import WITHOUT, left_out, our_backends

FOR_GPUS = ("triton", "cuda")


def backends_of(device: str) -> list[str]:
    """All that run on a device at full speed. Of those that are for GPUs and don't, the reason is printed."""
    found = our_backends(torch.device(device))
    for name in FOR_GPUS:
        if name not in found:
            print(f"without {name}: {why_not(name, device)}", flush=True)
    return found


def why_not(backend: str, device: str) -> str:
    """Why a backend is not among `backends_of`."""
    return f"{WITHOUT} names it" if backend in left_out() else available_backends(device)[backend]
