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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from fastvit.benchmarks.campaign import tiny
from fastvit.benchmarks.campaign.backends import backends_of
from fastvit.benchmarks.campaign.output import FAILED, PASSED, SKIPPED, report

PROGRAM = "compute-sanitizer"
FOLDERS = ("/usr/local/cuda/bin",)  # beside $PATH
TOOLS = ("memcheck", "racecheck", "synccheck")
REPORT = "==="  # starts a line of the tool's own
ERRORS = 86  # exit code by which the tool says that it found some
MOST_LINES = 60  # of a tool's report that are printed; it can have thousands
# "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:errors?|hazards?)(?:.*\((\d+) errors?)?")


@dataclass(frozen=True)
class Verdict:
    """What one tool found: a status, and words for it."""

    status: str
    words: str


def sanitize(out: Path, device: str = "cuda", backends: Sequence[str] | None = None) -> str:
    """Each tool on each backend (default: all that run), beside each other, since most of their time is loading.

    What they print is passed on as it comes, so that a cut-off loses none of it.
    """
    program = _program()
    if program is None:
        reason = f"{PROGRAM} is not on the PATH or in {', '.join(FOLDERS)}"
        print(f"skipped: {reason}")
        report(figure=reason)
        return SKIPPED
    found: dict[str, Verdict] = {}
    runs = {f"{name} {tool}": (tool, name) for name, tool in itertools.product(backends or backends_of(device), TOOLS)}
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        waiting = {pool.submit(_run, run, program, tool, device, name): run for run, (tool, name) in runs.items()}
        for future in as_completed(waiting):
            run, (code, text) = waiting[future], future.result()
            found[run] = verdict = judge(code, text)
            _say(run, f"{verdict.status}: {verdict.words}")
            report(run=run, status=verdict.status, words=verdict.words)
            report(figure="; ".join(f"{run} {found[run].words}" for run in runs if run in found))
    statuses = {verdict.status for verdict in found.values()}
    return FAILED if FAILED in statuses else PASSED if PASSED in statuses else SKIPPED


def _program() -> str | None:
    places = os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS])
    return shutil.which(PROGRAM, path=places)


def _run(run: str, program: str, tool: str, device: str, backend: str) -> tuple[int, str]:
    """The exit code of a tool and all that it printed, of which its own report is passed on as far as MOST_LINES."""
    # An allocator that hands out parts of larger blocks would hide accesses outside of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", str(ERRORS)]
    command += [sys.executable, "-u", "-m", tiny.__name__, device, backend]
    lines: list[str] = []
    reported = 0
    try:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                reported += line.startswith(REPORT)
                if reported <= MOST_LINES or not line.startswith(REPORT):
                    _say(run, line.rstrip())
    except OSError as error:
        return -1, str(error)
    return process.returncode, "".join(lines)


def _say(run: str, words: str) -> None:
    # One write, since the runs print beside each other.
    sys.stdout.write(f"{run}: {words}\n")
    sys.stdout.flush()


def judge(code: int, text: str) -> Verdict:
    """The verdict on a tool's exit code and output."""
    if tiny.STARTED not in text:
        return Verdict(SKIPPED, f"skipped: it can't work here: {_reason(code, text)}")
    errors = max(_errors(text), default=None)
    if errors or code == ERRORS:
        return Verdict(FAILED, f"{errors or 'some'} errors")
    if errors is None or tiny.FINISHED not in text:
        return Verdict(FAILED, f"did not finish: {_reason(code, text)}")
    return Verdict(PASSED, "0 errors")


def _errors(text: str) -> Iterator[int]:
    for match in SUMMARY.finditer(text):
        yield int(match[2] if match[2] is not None else match[1])


def _reason(code: int, text: str) -> str:
    """What the tool itself complains of, in lines that start with =========, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line.strip("= ") for line in lines if line.startswith(REPORT) and "rror" in line]
    return (own or lines or [f"exit code {code}"])[0 if own else -1]
