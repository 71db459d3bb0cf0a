"""The table of docs/interop.md: what the tests found, written by them where FASTVIT_WRITE_INTEROP is set.

Tests hand over what they found as properties of their reports, which pytest-xdist sends to the process that writes.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fastvit
from fastvit.interop import Unsupported
from tests.interop.subjects import GRADIENTS, OUTPUTS
from tests.interop.zoo import ENTRIES, Entry

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "interop.md"
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->\n"
VARIABLE = "FASTVIT_WRITE_INTEROP"
COMMAND = "make interop-docs"
PROPERTY = "interop"

# Heading → what fills it. The first two say which row it is, the last three are figures.
COLUMNS = {
    "library": "library",
    "model": "setting",
    "class": "class",
    "in one call": "fuses",
    "of the blocks": "trunk",
    "raw uint8": "uint8",
    f"outputs, ≤ {OUTPUTS:.0e}": "outputs",
    f"gradients, ≤ {GRADIENTS:.0e}": "gradients",
    "bfloat16, ≤ 2": "autocast",
}
FACTS = ("class", "fuses", "trunk", "uint8")


def is_written() -> bool:
    """Whether this run writes the table."""
    return bool(os.environ.get(VARIABLE))


def facts(entry: Entry, model: nn.Module) -> dict[str, str]:
    """What the row of an entry says that is no figure."""
    model = fastvit.accelerate(copy.deepcopy(model))
    fuses = [change.fuses for change in fastvit.report(model).changes]
    assert len(fuses) == 1, fuses
    trunk = ", ".join(dict.fromkeys(found.parts for found in fastvit.report(model).trunk)) or "–"
    mean = [0.5] * entry.channels
    try:
        fastvit.accelerate(model, mean=mean, std=mean)
        uint8 = "yes"
    except Unsupported as reason:
        uint8 = f"no: {str(reason).partition('images: ')[2]}"
    if entry.name == "naflexvit-patches":
        uint8 = "as whole images"  # of the same class; its processor normalises the patches
    assert (uint8 == "yes") == entry.uint8
    return {"class": f"`{type(model).__name__}`", "fuses": fuses[0], "trunk": trunk, "uint8": uint8}


def figure(entry: Entry, **found: str | float) -> tuple[str, dict[str, str]]:
    """Name and value of a property that says what was found for an entry."""
    return PROPERTY, {"entry": str(entry), **{name: text(name, value) for name, value in found.items()}}


def text(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if name == "autocast" else f"{value:.0e}"


class Writer:
    """A plugin that gathers what tests found, and writes the table at the end of a run that passed."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {}
        self.outcome = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == PROPERTY and isinstance(value, dict) and report.when == "call":
                self.found.setdefault(value["entry"], {}).update(value)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        missing = [str(entry) for entry in ENTRIES if len(self.found.get(str(entry), {})) < len(COLUMNS) - 1]
        if exitstatus != 0:
            self.outcome = "is as it was: tests failed"
        elif missing:
            self.outcome = f"is as it was: nothing was found for {', '.join(missing)}"
        else:
            write([{"library": e.library, "setting": e.setting, **self.found[str(e)]} for e in ENTRIES])
            self.outcome = "has a new table"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"{PAGE.relative_to(ROOT)} {self.outcome}")


def write(rows: list[dict[str, str]]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    lines = [line(list(COLUMNS)), line(["---"] * len(COLUMNS))]
    lines += [line([row[name] for name in COLUMNS.values()]) for row in rows]
    page = before + BEGIN + "".join(lines) + END + rest.partition(END)[2]
    PAGE.write_text(page, encoding="utf-8")


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def rows_of_page() -> list[dict[str, str]]:
    """The table as it stands, a dictionary a row."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [dict(zip(COLUMNS.values(), row, strict=True)) for row in rows[2:]]


def row_of_page(entry: Entry) -> dict[str, str]:
    """What the page says of an entry that is no figure; {} where it has no row."""
    for row in rows_of_page():
        if (row["library"], row["setting"]) == (entry.library, entry.setting):
            return {name: row[name] for name in FACTS}
    return {}
