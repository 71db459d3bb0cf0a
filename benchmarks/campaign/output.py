"""What stages share: words to the campaign, the files that keep what is found, and the backends that it is about."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.backend import available_backends
from fastvit.benchmarks.problem import WITHOUT, left_out, our_backends
from fastvit.benchmarks.rows import Row
from fastvit.validation.report import FAILED, PASSED, SKIPPED, Report

FILES = (
    "log.jsonl", "tests.jsonl", "tests.log", "validate.jsonl", "bench.jsonl", "tuning.json", "profile.jsonl",
    "summary.jsonl",
)  # fmt: skip
FOR_GPUS = ("triton", "cuda")
COMMAND = "make gpu STAGE="  # what a row of the campaign says it was measured by
MARK = "@campaign "  # starts a line that is for the campaign, not for people
# 77 is what test programs use for "skipped" elsewhere too; any other exit code says that the stage broke.
EXIT_CODES = {PASSED: 0, FAILED: 3, SKIPPED: 77}


def report(**values: Any) -> None:
    """Tell the campaign something for its log alone; `figure` is what its last table shows of this stage."""
    # One write with a line of its own, whatever other processes of the stage print.
    sys.stdout.write(f"\n{MARK}{json.dumps(values)}\n")
    sys.stdout.flush()


def understood(line: str) -> dict[str, Any] | None:
    """What `report` was told, None for any other line."""
    values = None
    if line.startswith(MARK):
        with contextlib.suppress(ValueError):
            values = json.loads(line.removeprefix(MARK))
    return values if isinstance(values, dict) else None


def skipped(reason: str) -> str:
    """The status of a stage that can't do anything here."""
    print(f"skipped: {reason}")
    report(figure=reason)
    return SKIPPED


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


def all_timed(missing: Sequence[Row]) -> bool:
    """Whether no row is without the time that it ought to have; of those that are, the reasons are printed."""
    for row in missing:
        print(f"not timed: {row.provider}, {row.shape}, {row.dtype}, {row.mode}: {row.reason}")
    return not missing


def append(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file that grows as results come, from several stages in turn."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def keep_verdicts(out: Path, parts: Iterable[Report]) -> str:
    """Write the rows of a validation as they come, and tell how it stands; the stage's status."""
    whole = Report()
    for part in parts:
        append(out / "validate.jsonl", (row.to_json() for row in part.rows))
        whole = Report(whole.rows + part.rows, part.title)
        report(figure=whole.summary())
    print_table(whole.table)
    return PASSED if whole.ok else FAILED


def run_program(
    command: Sequence[str], say: Callable[[str], None], environment: Mapping[str, str]
) -> tuple[int, list[str]]:
    """Run a program and `say` each line of its output, errors included, as it comes; its exit code, and all lines.

    Raises:
        OSError: it can't be started.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            lines.append(line.rstrip())
            say(lines[-1])
    return process.returncode, lines


def backends_of(device: str) -> list[str]:
    """All that run on a device at full speed. Of those that are for GPUs and don't, the reason is printed."""
    found = our_backends(torch.device(device))
    for name in FOR_GPUS:
        if name not in found:
            print(f"without {name}: {why_not(name, device) or 'it is interpreted'}", flush=True)
    return found


def why_not(backend: str, device: str) -> str:
    """Why a backend does not run on a device, "" if it does."""
    return f"{WITHOUT} names it" if backend in left_out() else available_backends(device)[backend]


class Log:
    """Prints, and keeps what was printed as JSON lines: seconds since the start, the stage, the text."""

    def __init__(self, path: Path, started: float) -> None:
        self._path, self._started, self._lock = path, started, threading.Lock()

    def __call__(self, stage: str, text: str, *, bare: bool = False) -> None:
        for line in text.splitlines():
            print(line if bare else f"[{stage}] {line}", flush=True)
            self.record(stage, {"text": line})

    def record(self, stage: str, values: dict[str, Any]) -> None:
        """A line of the file alone."""
        entry = {"at": round(time.monotonic() - self._started, 1), "stage": stage, **values}
        with self._lock:
            append(self._path, [json.dumps(entry)])
