"""Two files of rows side by side: what of ours became slower, and whether the machine changed under it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fastvit.benchmarks.rows import Row, grouped

TIMES = ("median_us", "p20_us", "p80_us")
LEAST_CHANGE = 0.03  # of the median: a smaller change is none, however narrow the spreads
VERDICTS = ("stopped running", "slower", "faster", "runs now", "unchanged", "never ran")
STOPPED, SLOWER, FASTER, STARTED, UNCHANGED, NEVER = VERDICTS
STYLES = {STOPPED: "red", SLOWER: "red", FASTER: "green"}


@dataclass(frozen=True)
class Change:
    """One provider in one case, measured twice."""

    before: Row
    after: Row

    @property
    def change(self) -> float | None:
        """The second median over the first, minus 1: 0.05 is 5% slower. None where it did not run twice."""
        if self.before.median_us is None or self.after.median_us is None:
            return None
        return self.after.median_us / self.before.median_us - 1

    @property
    def verdict(self) -> str:
        """Of VERDICTS. Slower and faster are changes of the median beyond LEAST_CHANGE whose spreads are apart."""
        if self.change is None:
            ran, runs = self.before.median_us is not None, self.after.median_us is not None
            return STOPPED if ran else STARTED if runs else NEVER
        if self.change > LEAST_CHANGE and _spread(self.after)[0] > _spread(self.before)[1]:
            return SLOWER
        if self.change < -LEAST_CHANGE and _spread(self.after)[1] < _spread(self.before)[0]:
            return FASTER
        return UNCHANGED

    @property
    def is_regression(self) -> bool:
        return self.before.is_ours and self.verdict in (STOPPED, SLOWER)

    def to_json(self) -> str:
        def some(row: Row, *names: str) -> dict[str, Any]:
            return {name: getattr(row, name) for name in names}

        about = some(self.after, "op", "shape", "dtype", "layout", "mode", "provider")
        about |= {"verdict": self.verdict, "change": self.change, "regression": self.is_regression}
        about |= {"before": some(self.before, *TIMES), "after": some(self.after, *TIMES), "reason": self.after.reason}
        return json.dumps(about)


@dataclass(frozen=True)
class Comparison:
    """What two files say of the same cases. `differences`: a line for each fact about the machines that differs."""

    changes: Sequence[Change]
    only_before: Sequence[Row]
    only_after: Sequence[Row]
    differences: Sequence[str]

    @property
    def regressions(self) -> list[Change]:
        """Rows of ours that became slower, or ran before and do not run now."""
        return [change for change in self.changes if change.is_regression]


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Match rows by case and provider; of rows that share both, the last one counts.

    Raises:
        ValueError: no row is in both.
    """
    first, second = ({(*row.case, row.provider): row for row in rows} for rows in (before, after))
    changes = [Change(row, second[key]) for key, row in first.items() if key in second]
    if not changes:
        raise ValueError("no case and provider is in both files: nothing to compare")
    return Comparison(
        changes,
        only_before=[row for key, row in first.items() if key not in second],
        only_after=[row for key, row in second.items() if key not in first],
        differences=_differences(changes),
    )


def format_comparison(comparison: Comparison) -> RenderableType:
    """For the terminal: how the machines differ, our rows with regressions first, rivals that moved, the rest."""
    ours = sorted((c for c in comparison.changes if c.before.is_ours), key=_most_urgent_first)
    rivals = sorted((c for c in comparison.changes if not c.before.is_ours), key=_most_urgent_first)
    moved = [change for change in rivals if change.verdict not in (UNCHANGED, NEVER)]
    parts: list[RenderableType] = []
    if comparison.differences:
        parts.append(Text("The two files differ in more than the code; times may have changed for that alone:", "bold"))
        parts += [Text(f"  {line}", "yellow") for line in comparison.differences]
    if ours:
        parts.append(_table("ours", ours))
    if moved:
        parts.append(
            _table("rivals that moved: their code is the same, so the machine or a version changed", moved, "dim")
        )
    parts += [Text(f"only before: {line}", "dim") for line in _cases(comparison.only_before)]
    parts += [Text(f"only after: {line}", "dim") for line in _cases(comparison.only_after)]
    parts += [Text(f"{name}: {_counted(changes)}") for name, changes in (("ours", ours), ("rivals", rivals)) if changes]
    return Group(*parts)


def _spread(row: Row) -> tuple[float, float]:
    median = row.median_us or 0.0
    return row.p20_us or median, row.p80_us or median


def _differences(changes: Sequence[Change]) -> list[str]:
    before, after = _facts(change.before for change in changes), _facts(change.after for change in changes)
    return [
        f"{name}: {before.get(name, 'not recorded')} before, {after.get(name, 'not recorded')} after"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _facts(rows: Iterable[Row]) -> dict[str, str]:
    """Device, threads and versions; a fact with several values has all of them."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        parts = re.fullmatch(r"(?P<device>.*), (?P<threads>\d+) threads", row.device)
        facts = parts.groupdict() if parts else {"device": row.device}
        for name, value in {**facts, **row.versions}.items():
            found.setdefault(name, {})[value or "none"] = None
    return {name: " and ".join(values) for name, values in found.items()}


def _most_urgent_first(change: Change) -> tuple[int, float]:
    return VERDICTS.index(change.verdict), -(change.change or 0.0)


def _table(title: str, changes: Sequence[Change], style: str = "") -> Table:
    numbers = [Column(heading, justify="right") for heading in ("before", "after", "change")]
    headings: list[Column | str] = ["case", "dtype", "mode", "provider", *numbers, "verdict"]
    table = Table(*headings, title=title, title_justify="left", style=style, row_styles=[style])
    for change in changes:
        row = change.before
        cells = (f"{row.op}, {row.shape}", f"{row.dtype}, {row.layout}", row.mode, row.provider)
        times = (_time_or_reason(change.before), _time_or_reason(change.after))
        percent = "" if change.change is None else f"{change.change:+.1%}"
        # The colour of a verdict belongs to us: a rival that became slower is no alarm.
        style_of = STYLES.get(change.verdict, "") if row.is_ours else ""
        table.add_row(*map(escape, (*cells, *times, percent, change.verdict)), style=style_of or None)
    return table


def _time_or_reason(row: Row) -> str:
    if row.median_us is None:
        return row.reason or "did not run"
    low, high = _spread(row)
    if row.median_us >= 1000:
        return f"{row.median_us / 1000:.2f} ms ({low / 1000:.2f}..{high / 1000:.2f})"
    return f"{row.median_us:.1f} µs ({low:.1f}..{high:.1f})"


def _cases(rows: Sequence[Row]) -> list[str]:
    """A line for each case, with everybody who is in it."""
    cases = grouped(rows, lambda row: row.case)
    return [f"{', '.join(case)}: {', '.join(row.provider for row in mine)}" for case, mine in cases.items()]


def _counted(changes: Sequence[Change]) -> str:
    counts = Counter(change.verdict for change in changes)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
