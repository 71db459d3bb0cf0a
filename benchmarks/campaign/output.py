"""What a stage says to the campaign, and the files that keep it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

FILES = (
    "log.jsonl",
    "tests.jsonl",
    "tests.log",
    "validate.jsonl",
    "bench.jsonl",
    "tuning.json",
    "profile.jsonl",
    "summary.jsonl",
)
MARK = "@campaign "  # starts a line that is for the campaign, not for people
# Of a stage. 77 is what test programs use for "skipped" elsewhere too; any other exit code says that the stage broke.
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
EXIT_CODES = {PASSED: 0, FAILED: 3, SKIPPED: 77}


def report(**values: Any) -> None:
    """Tell the campaign something for its log alone; `figure` is what its last table shows of this stage."""
    # One write with a line of its own, whatever other processes of the stage print.
    sys.stdout.write(f"\n{MARK}{json.dumps(values)}\n")
    sys.stdout.flush()


def understood(line: str) -> dict[str, Any] | None:
    """What `report` was told, None for any other line."""
    if not line.startswith(MARK):
        return None
    try:
        values = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def passed_if(ok: bool) -> str:
    """The status of a stage that can't be skipped."""
    return PASSED if ok else FAILED


def print_table(make: Callable[[], Any]) -> None:
    """Print what rich can print; without rich, say so."""
    try:
        from rich.console import Console

        table = make()
    except ImportError:
        print("(no table: rich is not installed; the rows are in the folder)")
        return
    Console(width=200).print(table)


def progress(done: int, total: int, title: str) -> None:
    """A line for each step."""
    print(f"{done}/{total} {title}", flush=True)


class Lines:
    """A file of lines that grows as results come, from several stages in turn."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._file.write(line.rstrip("\n") + "\n")
        self._file.flush()


class Log:
    """Prints, and keeps what was printed as JSON lines: seconds since the start, the stage, the text."""

    def __init__(self, path: Path, started: float) -> None:
        self._lines = Lines(path)
        self._started = started
        self._lock = threading.Lock()

    def __call__(self, stage: str, text: str, *, bare: bool = False) -> None:
        for line in text.splitlines():
            print(line if bare else f"[{stage}] {line}", flush=True)
            self.record(stage, {"text": line})

    def record(self, stage: str, values: dict[str, Any]) -> None:
        """A line of the file alone."""
        entry = {"at": round(time.monotonic() - self._started, 1), "stage": stage, **values}
        with self._lock:
            self._lines.write([json.dumps(entry)])
