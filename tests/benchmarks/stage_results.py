"""What a stage of the campaign has left: the rows in a file, and the figures among what it printed."""

from __future__ import annotations

import json
from pathlib import Path

from fastvit.benchmarks.campaign.output import understood


def rows_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_figure(printed: str) -> str:
    values = [found for line in printed.splitlines() if (found := understood(line)) and "figure" in found]
    return str(values[-1]["figure"])
