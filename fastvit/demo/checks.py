"""Step 1 of the demo: every backend that can run here, held to the float64 reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastvit.backend import available_backends
from fastvit.validation import validate
from fastvit.validation.report import SKIPPED, Report, Row

# A kernel that hangs in the interpreter must not hang the demo.
INTERPRETER_SECONDS = 900


@dataclass(frozen=True)
class Checks(Report):
    """Rows of all validations, and what went wrong around them."""

    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return super().ok and not self.problems

    @property
    def cases(self) -> list[str]:
        """Names of those that ran."""
        return sorted({row.case for row in self.rows if row.status != SKIPPED})

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("ok", "passed", "failed", "skipped", "problems", "cases")},
            "failures": [asdict(row) for row in self.failures],
            "not_run": {row.backend: row.reason for row in self.rows if row.status == SKIPPED},
        }


def run_checks(*, quick: bool, progress: Callable[[int, int, str], None]) -> Checks:
    """Validate here whatever this process can run, then Triton's kernels in the interpreter where there is no GPU."""
    rows = validate(quick=quick, progress=progress).rows
    triton_ran = any(row.backend == "triton" and row.status != SKIPPED for row in rows)
    if triton_ran or "TRITON_INTERPRET" not in available_backends("cpu")["triton"]:
        return Checks(rows)
    progress(len(rows), len(rows), "Triton's kernels in the interpreter")
    interpreted = check_interpreted(quick=quick)
    return Checks((*(row for row in rows if row.backend != "triton"), *interpreted.rows), problems=interpreted.problems)


def check_interpreted(*, quick: bool, only: Sequence[str] = ()) -> Checks:
    """Triton decides at its import whether to interpret, so this needs a process of its own."""
    command = [sys.executable, "-m", "fastvit.cli", "validate", "--backend", "triton", "--quick", "--json"]
    command += ["--device", "cpu"] + (["--dtype", "fp32"] if quick else []) + list(only)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=INTERPRETER_SECONDS)
    except subprocess.TimeoutExpired:
        return Checks(problems=(f"the interpreter did not finish within {INTERPRETER_SECONDS} s",))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for values in found:  # what JSON has no number for
        values.update({name: float("inf") for name in ("error", "bound") if values[name] is None})
    rows = tuple(Row(**{**values, "device": "interpreter"}) for values in found)
    if done.returncode in (0, 1) and rows:
        return Checks(rows)
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Checks(rows, problems=(f"validating triton in the interpreter failed (exit {done.returncode}): {last}",))
