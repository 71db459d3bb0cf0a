"""Step 4 of the demo: FastViT beside the eager convolution path and timm, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

# Enough for medians that repeat within a few percent on a quiet machine; `fastvit bench` takes longer.
SECONDS = 1.0


def run_benchmarks(*, quick: bool, progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Rows of the small suites as plain values, each with its ratios to the rivals."""
    from fastvit.benchmarks.runner import run_suites

    suites = ["patch_embed"] if quick else ["patch_embed", "model"]
    rows = run_suites(suites, "tiny" if quick else "small", progress=progress, seconds=None if quick else SECONDS)
    return [asdict(row) for row in rows]


def as_rows(rows: list[dict[str, Any]]) -> list[Any]:
    """Plain values back as rows, for `format_table`."""
    from fastvit.benchmarks.rows import Row

    return [Row(**row) for row in rows]
