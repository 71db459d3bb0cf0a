"""The benchmark suites, a stage each: rows are written as they come, and the headline is against the best rival.

These stages run without torch.compile. The stage `compiled` measures the cases that have compiled contenders once more,
with everybody in them, so that the best rival is the best of all; a cut-off there loses none of the other rows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastvit.benchmarks.campaign.ceilings import COMMAND
from fastvit.benchmarks.campaign.output import SKIPPED, Lines, passed_if, print_table, progress, report
from fastvit.benchmarks.problem import COMPILED, GRAPH, NO_COMPILE, NOT_COMPILED, Problem
from fastvit.benchmarks.rows import OURS, Row, format_table
from fastvit.benchmarks.runner import run_suites

SECONDS = 0.4  # of timing for each problem, all contenders together
WITH_COMPILED = ("patch_embed", "add_position", "model", "input", "masked")


def suite(name: str, out: Path, device: str = "cuda", size: str = "small", seconds: float = SECONDS) -> str:
    """One suite; fails where one of ours was not timed, because its results are wrong or it did not run."""
    return _measure(name, [name], out, device, size, seconds)


def compiled(
    out: Path, device: str = "cuda", size: str = "small", seconds: float = SECONDS, names: Sequence[str] = WITH_COMPILED
) -> str:
    """The cases of suites that have compiled contenders; skipped where FASTVIT_NO_COMPILE is set."""
    if os.environ.get(NO_COMPILE):
        print(NOT_COMPILED)
        report(figure=NOT_COMPILED)
        return SKIPPED
    return _measure("compiled", names, out, device, size, seconds, has_compiled)


def has_compiled(problem: Problem) -> bool:
    """Whether torch.compile is a setting of one of its contenders."""
    return any(COMPILED in contender.setting for contender in problem.contenders)


def _measure(
    stage: str,
    names: Sequence[str],
    out: Path,
    device: str,
    size: str,
    seconds: float,
    only: Callable[[Problem], bool] | None = None,
) -> str:
    lines = Lines(out / "bench.jsonl")
    rows: list[Row] = []

    def keep(found: Sequence[Row]) -> None:
        found = [replace(row, command=f"{COMMAND}{stage}") for row in found]
        lines.write(row.to_json() for row in found)
        rows.extend(found)
        report(figure=headline(rows))

    run_suites(names, size, device, progress, on_rows=keep, only=only, seconds=seconds)
    print_table(lambda: format_table(rows))
    missing = not_timed(rows)
    for row in missing:
        print(f"not timed: {row.provider}, {row.shape}, {row.dtype}, {row.mode}: {row.reason}")
    return passed_if(not missing and any(row.is_ours for row in rows))


def not_timed(rows: Sequence[Row]) -> list[Row]:
    """Our rows that ought to have a time. What can't be captured as a CUDA graph is no failure, nor what was not to be
    compiled."""
    missing = [row for row in rows if row.is_ours and row.median_us is None and row.reason != NOT_COMPILED]
    return [row for row in missing if not row.mode.endswith(GRAPH)]


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
