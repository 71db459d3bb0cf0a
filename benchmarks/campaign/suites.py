"""The benchmark suites, a stage each: rows are written as they come, and the headline is against the best rival."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastvit.benchmarks.campaign.ceilings import COMMAND
from fastvit.benchmarks.campaign.output import Lines, passed_if, print_table, progress, report
from fastvit.benchmarks.problem import GRAPH
from fastvit.benchmarks.rows import OURS, Row, format_table
from fastvit.benchmarks.runner import run_suites

SECONDS = 0.4  # of timing for each problem, all contenders together


def suite(name: str, out: Path, device: str = "cuda", size: str = "small", seconds: float = SECONDS) -> str:
    """One suite; fails where one of ours was not timed, because its results are wrong or it did not run."""
    lines = Lines(out / "bench.jsonl")
    rows: list[Row] = []

    def keep(found: Sequence[Row]) -> None:
        found = [replace(row, command=f"{COMMAND}{name}") for row in found]
        lines.write(row.to_json() for row in found)
        rows.extend(found)
        report(figure=headline(rows))

    run_suites([name], size, device, progress, on_rows=keep, seconds=seconds)
    print_table(lambda: format_table(rows))
    missing = not_timed(rows)
    for row in missing:
        print(f"not timed: {row.provider}, {row.shape}, {row.dtype}, {row.mode}: {row.reason}")
    return passed_if(not missing and any(row.is_ours for row in rows))


def not_timed(rows: Sequence[Row]) -> list[Row]:
    """Our rows that ought to have a time. What can't be captured as a CUDA graph is no failure."""
    return [row for row in rows if row.is_ours and row.median_us is None and not row.mode.endswith(GRAPH)]


def headline(rows: Sequence[Row]) -> str:
    """How many cases, the worst and best ratio of the fastest of ours to the best rival, which case is the worst, and
    how often each of ours is the fastest."""
    cases = len(dict.fromkeys(row.case for row in rows))
    words = [f"{cases} case{'' if cases == 1 else 's'}"]
    fastest: dict[tuple[str, ...], tuple[float, Row]] = {}
    for row in rows:
        if row.headline is not None and row.headline > fastest.get(row.case, (0.0,))[0]:
            fastest[row.case] = row.headline, row
    if fastest:
        (lowest, worst), (highest, _) = (choose(fastest.values(), key=lambda pair: pair[0]) for choose in (min, max))
        words.append(f"{lowest:.2f}x to {highest:.2f}x the best rival")
        words.append(f"worst: {worst.best_rival}, {worst.shape}, {worst.dtype}, {worst.mode}")
    wins = Counter(row.provider.removeprefix(OURS) for _, row in fastest.values())
    if len({row.provider for row in rows if row.headline is not None}) > 1:
        words.append("fastest of ours: " + ", ".join(f"{name} {count}" for name, count in wins.most_common()))
    missing = len(not_timed(rows))
    return "; ".join([*words, *([f"{missing} not timed"] if missing else [])])
