"""Step 1 of the demo: every backend that can run here, held to the float64 reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# A kernel that hangs in the interpreter must not hang the demo.
INTERPRETER_SECONDS = 900


@dataclass
class Checks:
    """Rows of all validations (as `fastvit validate --json` prints them) and their counts."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(row["status"] for row in self.rows)
        return {name: found[name] for name in ("passed", "failed", "skipped")}

    @property
    def ok(self) -> bool:
        return not self.problems and self.counts["failed"] == 0 and self.counts["passed"] > 0

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "failed"]

    def summary(self) -> list[dict[str, Any]]:
        """A line for each backend, device, op and dtype that ran; `strain` is the largest error over its bound."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.rows:
            if row["status"] != "skipped":
                key = (row["backend"], row["device"], row["op"], row["dtype"])
                groups.setdefault(key, []).append(row)
        return [_summary_line(key, rows) for key, rows in groups.items()]

    def not_run(self) -> dict[str, str]:
        """Backends without a single row that ran, with the reason."""
        ran = {row["backend"] for row in self.rows if row["status"] != "skipped"}
        return {row["backend"]: row["reason"] for row in self.rows if row["backend"] not in ran}


def _summary_line(key: tuple[str, ...], rows: list[dict[str, Any]]) -> dict[str, Any]:
    strains = [row["error"] / row["bound"] for row in rows if row.get("error") and row.get("bound")]
    return {
        **dict(zip(("backend", "device", "op", "dtype"), key, strict=True)),
        "cases": len({row["case"] for row in rows}),
        "photo_cases": len({row["case"] for row in rows if "photo" in row["case"]}),
        "passed": sum(row["status"] == "passed" for row in rows),
        "failed": sum(row["status"] == "failed" for row in rows),
        "strain": max(strains, default=0.0),
    }


def run_checks(*, quick: bool, progress: Callable[[int, int, str], None]) -> Checks:
    """Validate here whatever this process can run, then Triton's kernels in the interpreter where there is no GPU."""
    from fastvit.backend import available_backends
    from fastvit.validation import validate

    report = validate(quick=quick, progress=progress)
    rows = [asdict(row) for row in report.rows]
    checks = Checks(rows)
    triton_ran = any(row["backend"] == "triton" and row["status"] != "skipped" for row in rows)
    if not triton_ran and "TRITON_INTERPRET" in available_backends("cpu")["triton"]:
        progress(len(rows), len(rows), "Triton's kernels in the interpreter")
        checks.rows = [row for row in rows if row["backend"] != "triton"]
        _check_interpreted(checks, quick=quick)
    return checks


def _check_interpreted(checks: Checks, *, quick: bool, only: Sequence[str] = ()) -> None:
    """Triton decides at its import whether to interpret, so this needs a process of its own."""
    command = [sys.executable, "-m", "fastvit.cli", "validate", "--backend", "triton", "--quick", "--json"]
    command += ["--device", "cpu"] + (["--dtype", "fp32"] if quick else []) + list(only)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=INTERPRETER_SECONDS)
    except subprocess.TimeoutExpired:
        checks.problems.append(f"the interpreter did not finish within {INTERPRETER_SECONDS} s")
        return
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            checks.rows.append({**json.loads(line), "device": "interpreter"})
    if done.returncode not in (0, 1) or not any(row["backend"] == "triton" for row in checks.rows):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        checks.problems.append(f"validating triton in the interpreter failed (exit {done.returncode}): {last}")
