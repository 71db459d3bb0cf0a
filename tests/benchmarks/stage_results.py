"""What a stage of the campaign has left: the rows in a file, and what it said among what it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvit.benchmarks.campaign.output import understood


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(printed: str, name: str) -> list[Any]:
    """Every value that was reported under a name."""
    return [found[name] for line in printed.splitlines() if (found := understood(line)) and name in found]


def last_figure(printed: str) -> str:
    return str(said(printed, "figure")[-1])
