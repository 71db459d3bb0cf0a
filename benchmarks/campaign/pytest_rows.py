"""A pytest plugin: a line of JSON for each test as it starts and as it ends.

A cut-off leaves what was found, and the names of the tests that it came in.

FASTVIT_TEST_ROWS=rows.jsonl pytest -p fastvit.benchmarks.campaign.pytest_rows
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastvit.benchmarks.campaign.output import Lines

VARIABLE = "FASTVIT_TEST_ROWS"
STARTED = "started"  # the status of a test that has not ended


class Rows:
    """Writes the outcome of every test, and of every file that could not be collected."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test that hangs has no other row."""
        self._write(nodeid, STARTED, 0.0, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up and tear-down count where something went wrong in them; a crashed worker's report has no phase."""
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.duration, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file or a module that can't be imported is a failure; one that skips itself says why."""
        if report.outcome != "passed":
            self._write(report.nodeid, report.outcome, 0.0, report.longrepr)

    def _write(self, test: str, status: str, seconds: float, details: Any) -> None:
        row = {"test": test, "status": status, "seconds": round(seconds, 3), "message": message_of(details)}
        self._lines.write([json.dumps(row)])


def message_of(details: Any) -> str:
    """One line of what pytest has to say of a test: the reason of a skip, the place and the error of a failure."""
    if not details:
        return ""
    if isinstance(details, tuple):  # a skip: file, line, reason
        return str(details[2])[:300]
    crash = getattr(details, "reprcrash", None)
    lines = str(crash.message if crash else details).strip().splitlines() or [""]
    return (f"{os.path.relpath(crash.path)}:{crash.lineno}: {lines[0]}" if crash else lines[-1])[:300]


def pytest_configure(config: pytest.Config) -> None:
    """In the process that collects the results; the workers of pytest-xdist report to it."""
    if os.environ.get(VARIABLE) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows(Path(os.environ[VARIABLE])), "fastvit-rows")
