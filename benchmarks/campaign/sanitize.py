"""Stage sanitize: every kernel on the smallest shapes under compute-sanitizer, where that tool works.

memcheck finds accesses outside of what was allocated, racecheck threads of a block that disturb each other, synccheck
barriers that not all threads reach. The tool is not on every machine, and can't work on some; that is no fault of the
kernels, and the stage is skipped there.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from fastvit.benchmarks.campaign import tiny
from fastvit.benchmarks.campaign.output import backends_of, report, run_program, skipped
from fastvit.validation.report import FAILED, PASSED, SKIPPED

PROGRAM = "compute-sanitizer"
FOLDERS = ("/usr/local/cuda/bin",)  # beside $PATH
TOOLS = ("memcheck", "racecheck", "synccheck")
REPORT = "==="  # starts a line of the tool's own
ERRORS = 86  # exit code by which the tool says that it found some
MOST_LINES = 60  # of a tool's report that are printed; it can have thousands
# In place of the tool, where it is not: the program alone, and a report.
STAND_IN = "import subprocess, sys; subprocess.run(sys.argv[5:], check=True); print('= ERROR SUMMARY: 0 errors')"
# "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)(?:.*\((\d+) errors?)?")


def sanitize(
    out: Path, device: str = "cuda", backends: Sequence[str] | None = None, program: Sequence[str] = (),
    tools: Sequence[str] = TOOLS,
) -> str:  # fmt: skip
    """Each tool on each backend (default: all that run), beside each other, since most of their time is loading.

    What they print is passed on as it comes, so that a cut-off loses none of it. `program` stands in for the tools'.
    """
    found_at = shutil.which(PROGRAM, path=os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS]))
    if not program and found_at is None:
        return skipped(f"{PROGRAM} is not on the PATH or in {', '.join(FOLDERS)}")
    program = program or [str(found_at)]
    found: dict[str, tuple[str, str]] = {}
    runs = {f"{name} {tool}": (tool, name) for name, tool in itertools.product(backends or backends_of(device), tools)}
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        waiting = {pool.submit(_run, run, program, tool, device, name): run for run, (tool, name) in runs.items()}
        for future in as_completed(waiting):
            run = waiting[future]
            status, words = found[run] = judge(*future.result())
            print(f"{run}: {status}: {words}", flush=True)
            figure = "; ".join(f"{run} {found[run][1]}" for run in runs if run in found)
            report(run=run, status=status, words=words, figure=figure)
    statuses = {status for status, _ in found.values()}
    return next((status for status in (FAILED, PASSED) if status in statuses), SKIPPED)


def _run(run: str, program: Sequence[str], tool: str, device: str, backend: str) -> tuple[int, list[str]]:
    """The exit code of a tool and all that it printed, of which its own report is passed on as far as MOST_LINES."""
    command = [*program, "--tool", tool, "--error-exitcode", str(ERRORS)]
    command += [sys.executable, "-u", "-m", tiny.__name__, device, backend]
    reported = itertools.count(1)

    def pass_on(line: str) -> None:
        if not line.startswith(REPORT) or next(reported) <= MOST_LINES:
            sys.stdout.write(f"{run}: {line}\n")  # one write, since the runs print beside each other

    try:
        # An allocator that hands out parts of larger blocks would hide accesses outside of a tensor.
        return run_program(command, pass_on, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    except OSError as error:
        return -1, [str(error)]


def judge(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """The status of a run by its tool's exit code and output, and words for it."""
    if not any(tiny.STARTED in line for line in lines):
        return SKIPPED, f"skipped: it can't work here: {_reason(code, lines)}"
    counts = [int(match[2] or match[1]) for line in lines if (match := SUMMARY.search(line))]
    errors = max(counts, default=None)
    if errors or code == ERRORS:
        return FAILED, f"{errors or 'some'} errors"
    if errors is None or not any(tiny.FINISHED in line for line in lines):
        return FAILED, f"did not finish: {_reason(code, lines)}"
    return PASSED, "0 errors"


def _reason(code: int, lines: Sequence[str]) -> str:
    """What the tool itself complains of, in lines that start with =========, else the last line."""
    own = [line.strip("= ") for line in lines if line.startswith(REPORT) and "rror" in line]
    return next(iter(own or [line for line in reversed(lines) if line]), f"exit code {code}")
