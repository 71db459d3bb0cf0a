"""Which backends the stages hold to the truth and measure."""

from __future__ import annotations

import torch

from fastvit.backend import available_backends
from fastvit.benchmarks.problem import our_backends

FOR_GPUS = ("triton", "cuda")


def backends_of(device: str) -> list[str]:
    """All that run on a device at full speed. Of those that are for GPUs and can't run, the reason is printed."""
    found = our_backends(torch.device(device))
    reasons = available_backends(device)
    for name in FOR_GPUS:
        if name not in found:
            print(f"without {name}: {reasons[name]}", flush=True)
    return found
