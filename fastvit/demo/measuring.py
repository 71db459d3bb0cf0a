"""Step 4 of the demo: FastViT beside the eager convolution path and timm, in this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastvit.benchmarks import patch_embed
from fastvit.benchmarks.rows import Row
from fastvit.benchmarks.runner import SECONDS as SUITE_SECONDS
from fastvit.benchmarks.runner import SUITES, run_plan

# Enough for medians that repeat within a few percent on a quiet machine; `fastvit bench` takes longer.
SECONDS = 1.0


def run_benchmarks(*, quick: bool, progress: Callable[[int, int, str], None]) -> list[Row]:
    """Rows of a few cases, each of ours with its ratios to the rivals."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if quick:
        return run_plan(SUITES["patch_embed"]("tiny", device), device, SUITE_SECONDS["tiny"], progress)
    # One model width is enough here, and rivals as they are, for compiling them takes longer than all else.
    shape = patch_embed.Shape("S", 256 if on_gpu else 16)
    plan = [
        (f"{shape}, {precision}", partial(patch_embed.problems_of, shape, precision, device))
        for precision in (patch_embed.ON_GPU if on_gpu else patch_embed.ON_CPU)
    ]
    return run_plan(plan + SUITES["model"]("small", device)[:1], device, SECONDS, progress)
