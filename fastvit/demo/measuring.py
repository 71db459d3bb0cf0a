"""Step 4 of the demo: FastViT beside the eager convolution path and timm, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

# Enough for medians that repeat within a few percent on a quiet machine; `fastvit bench` takes longer.
SECONDS = 1.0
SHAPE = "ViT-S/"


def run_benchmarks(*, quick: bool, progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Rows of a few cases as plain values, each of ours with its ratios to the rivals."""
    import torch

    from fastvit.benchmarks.runner import SECONDS as SUITE_SECONDS
    from fastvit.benchmarks.runner import SUITES, run_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = "tiny" if quick else "small"
    embedding, models = SUITES["patch_embed"](size, device), SUITES["model"](size, device)
    # The suites' first cases are their smallest: one model width is enough here.
    plan = embedding if quick else [case for case in embedding if SHAPE in case[0]] + list(models[:1])
    rows = run_plan(plan, device, SUITE_SECONDS[size] if quick else SECONDS, progress)
    return [asdict(row) for row in rows]


def as_rows(rows: list[dict[str, Any]]) -> list[Any]:
    """Plain values back as rows, for `format_table`."""
    from fastvit.benchmarks.rows import Row

    return [Row(**row) for row in rows]
