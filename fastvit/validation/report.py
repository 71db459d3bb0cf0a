"""What a validation found: one row for each case and tensor, and the ways to print them."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fastvit.validation.tolerance import strain

if TYPE_CHECKING:
    from rich.table import Table

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
SUBJECT = ("backend", "device", "op", "dtype")  # what the rows of a line of the table share


@dataclass(frozen=True)
class Row:
    """One tensor of one case on one backend: its error, the bound it is held to, and the verdict.

    `quantity` is "forward", "d_<argument>" or "repeat" (the same call twice, bit by bit). `reason` says why a row was
    skipped, or why it failed where that is not a matter of error and bound.
    """

    backend: str
    op: str
    dtype: str
    case: str
    quantity: str
    status: str
    error: float = 0.0
    bound: float = 0.0
    where: str = ""
    reason: str = ""
    device: str = "cpu"

    @property
    def subject(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in SUBJECT)

    @property
    def strain(self) -> float:
        """Error as a share of the bound: above 1 is a failure."""
        return strain(self.error, self.bound)

    def to_json(self) -> str:
        """One line of JSON; numbers that JSON has no word for become null."""
        values = asdict(self)
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})


@dataclass(frozen=True)
class Report:
    """All rows of a validation."""

    rows: tuple[Row, ...] = ()
    title: str = "Validation against float64"

    @property
    def passed(self) -> int:
        return self._count(PASSED)

    @property
    def failed(self) -> int:
        return self._count(FAILED)

    @property
    def skipped(self) -> int:
        return self._count(SKIPPED)

    @property
    def ok(self) -> bool:
        """Something ran and nothing failed."""
        return self.failed == 0 and self.passed > 0

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAILED]

    def _count(self, status: str) -> int:
        return sum(row.status == status for row in self.rows)

    def skip_reasons(self) -> dict[tuple[str, str], int]:
        """(backend, reason) → how many rows were skipped for it."""
        return dict(Counter((row.backend, row.reason) for row in self.rows if row.status == SKIPPED))

    def summary(self) -> str:
        """One line: what passed, failed and was skipped."""
        verdict = "passed" if self.ok else "FAILED" if self.failed else "nothing ran"
        return f"{verdict}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    def to_json_lines(self) -> str:
        """Every row as a line of JSON."""
        return "".join(row.to_json() + "\n" for row in self.rows)

    def table(self, max_failures: int = 20) -> Table:
        """A rich table: a line for each backend, op and dtype, then the failures, then the reasons of what was skipped.

        `of bound` is the largest error found, as a share of what is allowed for it; above 100% is a failure.
        """
        from rich.table import Column, Table

        numbers = [Column(name, justify="right") for name in ("cases", "passed", "failed", "skipped", "of bound")]
        last = Column("closest to its bound", max_width=60)
        table = Table(*SUBJECT, *numbers, last, title=self.title, caption=self.summary())
        groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.subject].append(row)
        for subject, rows in groups.items():
            ran = [row for row in rows if row.status != SKIPPED]
            if not ran:
                continue
            worst = max(ran, key=lambda row: math.inf if row.reason else row.strain)
            counts = Counter(row.status for row in rows)
            failed = f"[red]{counts[FAILED]}[/red]" if counts[FAILED] else "0"
            closest = "error" if worst.reason else f"{worst.strain:.0%}" if worst.strain < 100 else "over 100x"
            counted = (str(len({row.case for row in ran})), str(counts[PASSED]), failed, str(counts[SKIPPED]))
            table.add_row(*subject, *counted, closest, f"{worst.quantity}: {worst.case}")
        if self.failures:
            table.add_section()
        for row in self.failures[:max_failures]:
            found = row.reason or f"error {row.error:.3g} > {row.bound:.3g}, {row.where}"
            text = f"{row.quantity}: {row.case}: {found}"
            table.add_row(*row.subject, "", "", "[red]failed[/red]", "", "", text)
        if len(self.failures) > max_failures:
            table.add_row(*[""] * 9, f"and {len(self.failures) - max_failures} more failures")
        reasons = self.skip_reasons()
        if reasons:
            table.add_section()
        for (backend, reason), count in reasons.items():
            table.add_row(backend, "", "", "", "", "", "", str(count), "", reason)
        return table
