"""Step 4 of the demo: FastViT beside the eager convolution path and timm, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

# Enough for medians that repeat within a few percent on a quiet machine; `fastvit bench` takes longer.
SECONDS = 1.0


def run_benchmarks(*, quick: bool, progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Rows of a few cases as plain values, each of ours with its ratios to the rivals."""
    import torch

    from fastvit.benchmarks import patch_embed
    from fastvit.benchmarks.runner import SECONDS as SUITE_SECONDS
    from fastvit.benchmarks.runner import SUITES, run_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if quick:
        plan = SUITES["patch_embed"]("tiny", device)
    else:  # one model width is enough here, and rivals as they are, for compiling them takes longer than all else
        shape = patch_embed.Shape("S", 256 if on_gpu else 16)
        plan = [
            (f"{shape}, {precision}", partial(patch_embed.problems_of, shape, precision, device))
            for precision in (patch_embed.ON_GPU if on_gpu else patch_embed.ON_CPU)
        ]
        plan += SUITES["model"]("small", device)[:1]
    size = "tiny" if quick else "small"
    rows = run_plan(plan, device, SUITE_SECONDS[size] if quick else SECONDS, progress)
    return [asdict(row) for row in rows]


def as_rows(rows: list[dict[str, Any]]) -> list[Any]:
    """Plain values back as rows, for `format_table`."""
    from fastvit.benchmarks.rows import Row

    return [Row(**row) for row in rows]
