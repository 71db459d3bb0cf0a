"""A problem: one case, everybody who solves it, and the check that ours solves it rightly before it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fastvit.backend import BACKENDS, available_backends
from fastvit.benchmarks.rows import OURS, Row
from fastvit.benchmarks.timing import Call, Timing, captured, ceilings, interleave, peak_bytes
from fastvit.validation.runner import is_interpreted

SIZES = ("tiny", "small", "full")
FORWARD, BOTH, STEP = "forward", "forward+backward", "training step"
GRAPH = ", cuda graph"


class Unavailable(RuntimeError):
    """A contender can't run here, or does not compute the right thing; the message is the reason in its row."""


@dataclass(frozen=True)
class Contender:
    """A provider, and how to make the call that is timed. `build` raises Unavailable with the reason."""

    provider: str
    build: Callable[[], Call]


@dataclass(frozen=True)
class Problem:
    """One case for all contenders. `check` maps a backend to the reason why it must not be timed ("" if it may)."""

    op: str
    shape: str
    dtype: str
    layout: str
    mode: str
    contenders: Sequence[Contender]
    check: Callable[[str], str]
    compute: torch.dtype = torch.float32
    flops: float = 0.0
    moved: float = 0.0  # bytes that any solution must read and write


Plan = list[tuple[str, Callable[[], Iterator[Problem]]]]
"""What a suite consists of: a title for the progress bar, and the problems of the case, made when asked for."""


def our_backends(device: torch.device) -> list[str]:
    """Backends worth timing on a device: all that run there at full speed, the reference left out."""
    reasons = available_backends(device)
    return [b for b in BACKENDS if b != "reference" and not reasons[b] and not is_interpreted(b, device)]


def check_size(size: str) -> None:
    """Raise ValueError unless `size` is known."""
    if size not in SIZES:
        raise ValueError(f"size: unknown size {size!r}; known: {', '.join(SIZES)}")


@contextmanager
def steady(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Settings under which timings are comparable: a fixed number of CPU threads, cuDNN allowed to choose."""
    before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads or before)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.benchmark = benchmark


def measure(problem: Problem, device: torch.device, seconds: float) -> list[Row]:
    """Check, then time all contenders of a problem side by side; a row each, ours with the ratios."""
    blank = Row(problem.op, problem.shape, problem.dtype, problem.layout, "", problem.mode)
    ready: list[tuple[str, Call]] = []
    rows: dict[str, Row] = {}
    torch._dynamo.reset()  # compiled rivals start afresh: many shapes of one function exhaust its cache
    for contender in problem.contenders:
        rows[contender.provider] = replace(blank, provider=contender.provider)
        try:
            if contender.provider.startswith(OURS):
                reason = problem.check(contender.provider.removeprefix(OURS))
                if reason:
                    raise Unavailable(reason)
            call = contender.build()
            call()
            ready.append((contender.provider, call))
        except Unavailable as error:
            rows[contender.provider] = replace(blank, provider=contender.provider, reason=str(error))
        except Exception as error:  # a rival that fails is a finding for its row, not the end of the run
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            rows[contender.provider] = replace(blank, provider=contender.provider, reason=reason)
    found = _timed(problem, ready, rows, device, seconds)
    if device.type == "cuda":
        found += _timed_graphs(problem, ready, blank, device, seconds)
    return found


def _timed(
    problem: Problem, ready: list[tuple[str, Call]], rows: dict[str, Row], device: torch.device, seconds: float
) -> list[Row]:
    timings = dict(
        zip([name for name, _ in ready], interleave([call for _, call in ready], device, seconds), strict=True)
    )
    peaks = {name: peak_bytes(call, device) for name, call in ready}
    floor = ceilings(device, problem.compute).floor_us(problem.flops, problem.moved) if problem.flops else None
    return [
        _filled(row, timings[name], peaks[name], floor, timings) if name in timings else row
        for name, row in rows.items()
    ]


def _timed_graphs(
    problem: Problem, ready: list[tuple[str, Call]], blank: Row, device: torch.device, seconds: float
) -> list[Row]:
    blank = replace(blank, mode=blank.mode + GRAPH)
    rows: dict[str, Row] = {}
    replays: list[tuple[str, Call]] = []
    for name, call in ready:
        rows[name] = replace(blank, provider=name)
        try:
            replays.append((name, captured(call, device)))
        except Exception as error:
            torch.cuda.synchronize(device)
            reason = f"can't be captured: {type(error).__name__}"
            rows[name] = replace(blank, provider=name, reason=reason)
    return _timed(problem, replays, rows, device, seconds)


def _filled(row: Row, timing: Timing, peak: int | None, floor: float | None, timings: dict[str, Timing]) -> Row:
    ratios = {}
    if row.provider.startswith(OURS):
        rivals = {name: other for name, other in timings.items() if not name.startswith(OURS)}
        ratios = {name: round(other.median_us / timing.median_us, 4) for name, other in rivals.items()}
    return replace(
        row,
        median_us=round(timing.median_us, 3),
        p20_us=round(timing.p20_us, 3),
        p80_us=round(timing.p80_us, 3),
        repeats=timing.repeats,
        peak_bytes=peak,
        floor_share=None if floor is None else round(floor / timing.median_us, 4),
        ratios=ratios,
    )


def compiled(function: Callable[[], object], device: torch.device, mode: str = "default") -> Call:
    """The function under torch.compile, compiled now.

    Raises:
        Unavailable: it can't be compiled here.
    """
    call = torch.compile(function, mode=mode, dynamic=False)
    started = time.monotonic()
    try:
        call()
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unavailable(f"torch.compile failed after {time.monotonic() - started:.0f} s: {first}") from error
    return call
