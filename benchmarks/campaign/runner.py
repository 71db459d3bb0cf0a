"""Runs the stages: a process each, a deadline each, and a table of what they found."""

from __future__ import annotations

import contextlib
import faulthandler
import fnmatch
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from fastvit.benchmarks.campaign.output import EXIT_CODES, FILES, Log, append, understood
from fastvit.validation.report import FAILED, PASSED, SKIPPED

LEAST = 0.6  # of its share, with which a stage is still worth starting: it takes seconds to load what it needs
DUMP = 0.5  # seconds that a stage has to say where it hangs, before it is killed
GRACE = 5.0  # seconds that a killed process has to go
CUT_OFF, NO_TIME = "cut off", "no time left"  # what a stage can't say of itself
DRY_RUN = "--dry-run"


@dataclass(frozen=True)
class Stage:
    """A step of the campaign.

    `share` is its part of the budget in seconds; `run` is called with the folder, in a process of its own, and returns
    PASSED, FAILED or SKIPPED; `dry` are more arguments with which it is over soon on a CPU. `calls` are the letters of
    the calls that it is part of, and `environment` is what its process has in its environment in addition.
    """

    name: str
    share: int
    about: str
    run: Callable[..., str]
    dry: Mapping[str, Any] = field(default_factory=dict)
    calls: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a stage. `figure` is what its last words were about: its key figure, or why it failed."""

    stage: str
    status: str
    seconds: float
    figure: str = ""


class Listener:
    """Passes on what a stage prints, and remembers its figure and its last words."""

    def __init__(self, stage: str, log: Log) -> None:
        self._stage, self._log = stage, log
        self.figure = self.last = ""

    def listen(self, output: IO[str]) -> None:
        """Hear everything until the output is closed."""
        for line in output:
            values = understood(line)
            if values is not None:
                self._log.record(self._stage, values)
                self.figure = str(values.get("figure", self.figure))
            elif line.strip():
                self._log(self._stage, line.rstrip("\n"))
                self.last = line.strip()


def find_stages(stages: Sequence[Stage], wanted: Sequence[str] | None) -> list[Stage]:
    """The wanted stages in the campaign's order; names may hold several, separated by commas, and a * in one stands
    for any letters. None: all.

    Raises:
        ValueError: no such stage.
    """
    if wanted is None:
        return list(stages)
    names = [part.strip() for value in wanted for part in value.split(",") if part.strip()]
    known = [stage.name for stage in stages]
    unknown = [name for name in names if not fnmatch.filter(known, name)]
    if unknown or not names:
        raise ValueError(f"--stage {unknown[0] if unknown else '(empty)'}: known are {', '.join(known)}")
    return [stage for stage in stages if any(fnmatch.fnmatchcase(stage.name, name) for name in names)]


def campaign(
    stages: Sequence[Stage], out: Path, budget: float, about: dict[str, Any], started: float | None = None,
    *, dry: bool = False,
) -> int:  # fmt: skip
    """Run stages in order within the budget, counted from `started`; the exit code.

    Files of an earlier campaign in the folder are replaced.
    """
    started = time.monotonic() if started is None else started
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    log, summary = Log(out / "log.jsonl", started), out / "summary.jsonl"
    append(summary, [json.dumps(about)])
    log("device", json.dumps(about))

    def run(stage: Stage, deadline: float) -> Result:
        left = deadline - time.monotonic()
        is_worth_it = left >= LEAST * stage.share
        result = run_stage(stage, out, left, log, dry) if is_worth_it else Result(stage.name, NO_TIME, 0.0)
        append(summary, [json.dumps(asdict(result))])
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map if dry else map  # side by side where times mean nothing
        results = list(each(run, stages, _deadlines(stages, started, budget)))
    log("summary", format_results(results), bare=True)
    not_run = [result.stage for result in results if result.status == NO_TIME]
    if not_run:
        log("summary", f"Not run, since {budget:.0f} s were too few: {', '.join(not_run)}", bare=True)
    log("summary", f"Results: {out}" + (", of a dry run on a CPU: their times mean nothing" if dry else ""), bare=True)
    return int(any(result.status not in (PASSED, SKIPPED) for result in results))


def _deadlines(stages: Sequence[Stage], started: float, budget: float) -> list[float]:
    """When each stage must have ended: the budget is shared out in proportion, and nobody's share is another's.

    A budget smaller than all shares together goes to the first stages, and the last ones have what those leave unspent:
    with less than its share a stage finds out little.
    """
    stretch = max(1.0, budget / sum(stage.share for stage in stages))
    spent = itertools.accumulate(stretch * stage.share for stage in stages)
    return [started + min(seconds, budget) for seconds in spent]


def run_stage(stage: Stage, out: Path, seconds: float, log: Log, dry: bool = False) -> Result:
    """Run a stage in its own process, pass on what it prints, and end it when its seconds are over."""
    command = [sys.executable, "-u", "-m", "fastvit.benchmarks.campaign", "--inside", stage.name, "--out", str(out)]
    environment = {**os.environ, **stage.environment, "PYTHONIOENCODING": "utf-8:replace"}
    if dry:  # kernels run in the interpreter, and the extension need not be there
        command.append(DRY_RUN)
        environment |= {"TRITON_INTERPRET": "1", "FASTVIT_BUILD_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("TRITON_INTERPRET", None)
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    listener = Listener(stage.name, log)
    status = _follow(process, listener, seconds)
    figure = listener.figure
    if status == FAILED and process.returncode != EXIT_CODES[FAILED]:  # it broke
        words = f"ended by signal {-process.returncode}" if process.returncode < 0 else listener.last
        figure = "; ".join(part for part in (figure, words) if part)
    elif status in (FAILED, CUT_OFF):
        figure = figure or listener.last
    return Result(stage.name, status, round(time.monotonic() - started, 1), figure[:300])


def _follow(process: subprocess.Popen[str], listener: Listener, seconds: float) -> str:
    """Wait for a process, no longer than `seconds`, while its output is passed on; its status.

    Neither a process that can't be killed (one may be stuck in the driver) nor one that left its session and holds the
    pipe open makes the campaign wait.
    """
    reader = threading.Thread(target=listener.listen, args=(process.stdout,), daemon=True)
    reader.start()
    last = None  # what it said of itself, before it was asked where it is
    try:
        code = process.wait(seconds)
        status = next((name for name, known in EXIT_CODES.items() if known == code), FAILED)
    except subprocess.TimeoutExpired:
        status, last = CUT_OFF, listener.last
        # `end_inside` made it ready to print the Python frames that it is in.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.kill(process.pid, signal.SIGUSR1)
            process.wait(DUMP)
    finally:
        # The stage leads a session of its own: its pool, its pytest and its compilers go with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    reader.join(GRACE)
    listener.last = listener.last if last is None else last
    return status


def end_inside(stage: Stage, out: Path, dry: bool = False) -> int:
    """Run a stage in this process; its exit code."""
    out.mkdir(parents=True, exist_ok=True)
    faulthandler.register(signal.SIGUSR1, file=2)  # the file that the campaign listens to, whatever Python's stream is
    return EXIT_CODES[stage.run(out, **(stage.dry if dry else {}))]


def format_results(results: Sequence[Result]) -> str:
    """The short table at the end."""
    width = max((len(result.stage) for result in results), default=0)
    lines = (f"{r.stage:{width}}  {r.status:12}  {r.seconds:6.1f} s  {r.figure}".rstrip() for r in results)
    return "\n".join(lines)
