"""A problem: one case, everybody who solves it, and the check that ours solves it rightly before it is timed."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeVar

import torch

from fastvit.backend import BACKENDS, available_backends, check_known
from fastvit.benchmarks.rows import OURS, Row
from fastvit.benchmarks.timing import (
    Call,
    Ceilings,
    Timing,
    captured,
    ceilings,
    interleave,
    keep_freed_memory,
    peak_bytes,
)
from fastvit.validation.runner import is_interpreted

SIZES = ("tiny", "small", "full")
WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024}  # of the models
FORWARD, BOTH, STEP = "forward", "forward+backward", "training step"
COMPILED, MAX_AUTOTUNE, CHANNELS_LAST = "compiled", "compiled max-autotune", "channels_last"  # settings of rivals
GRAPH = ", cuda graph"
WITHOUT = "FASTVIT_WITHOUT"  # environment variable: backends that are left out, separated by commas
NO_COMPILE = "FASTVIT_NO_COMPILE"  # environment variable: where it is set, nothing is compiled by torch.compile
NOT_COMPILED = f"not compiled in this run: {NO_COMPILE} is set"


def usual_batches(size: str, on_gpu: bool) -> tuple[int, ...]:
    """How many images at once a model embeds where it is measured."""
    if size == "small":
        return (256,) if on_gpu else (16,)
    return (64, 256, 1024) if on_gpu else (1, 16)


class Unavailable(RuntimeError):
    """A contender can't run here, or does not compute the right thing; the message is the reason in its row."""


class NotCompiled(Unavailable):
    """A contender was to be compiled, in a run that is to do without."""


@dataclass(frozen=True)
class Contender:
    """Who takes part, and how to make the call that is timed. `build` raises Unavailable with the reason.

    A rival may take part in several settings, of which the best one counts. `whole` is False for one that does only
    a part of the job: a yardstick, never the best rival.
    """

    name: str  # fastvit:<backend>, or the rival
    build: Callable[[], Call]
    setting: str = ""
    whole: bool = True

    @property
    def provider(self) -> str:
        return f"{self.name} {self.setting}".strip()

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


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
    batch: int = 0
    flops: float = 0.0
    moved: float = 0.0  # bytes that any solution must read and write


Result = TypeVar("Result")
_copies = itertools.count()

Plan = list[tuple[str, Callable[[], Iterator[Problem]]]]
"""What a suite consists of: a title for the progress bar, and the problems of the case, made when asked for."""


def our_backends(device: torch.device) -> list[str]:
    """Backends worth timing on a device: all that run there at full speed, but for the reference and `left_out`."""
    reasons = available_backends(device)
    without = ("reference", *left_out())
    return [b for b in BACKENDS if b not in without and not reasons[b] and not is_interpreted(b, device)]


def left_out() -> list[str]:
    """Backends that the environment variable FASTVIT_WITHOUT names, so that a broken one can be gone round.

    Raises:
        ValueError: an unknown backend.
    """
    names = [part.strip() for part in os.environ.get(WITHOUT, "").split(",") if part.strip()]
    for name in names:
        check_known(name, WITHOUT)
    return names


def check_size(size: str) -> None:
    """Raise ValueError unless `size` is known."""
    if size not in SIZES:
        raise ValueError(f"size: unknown size {size!r}; known: {', '.join(SIZES)}")


@contextmanager
def steady(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Settings under which timings are comparable: a fixed number of CPU threads, memory kept, cuDNN allowed to choose.

    The process keeps the memory that it frees afterwards too.
    """
    keep_freed_memory()
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
    ready: list[tuple[Contender, Call]] = []
    reasons: dict[str, str] = {}
    torch._dynamo.reset()  # compiled rivals start afresh: many shapes of one function exhaust its cache
    for contender in problem.contenders:
        try:
            if contender.is_ours:
                reason = problem.check(contender.name.removeprefix(OURS))
                if reason:
                    raise Unavailable(reason)
            call = contender.build()
            call()
            ready.append((contender, call))
        except Unavailable as error:
            reasons[contender.provider] = str(error)
        except Exception as error:  # a rival that fails is a finding for its row, not the end of the run
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            reasons[contender.provider] = f"{type(error).__name__}: {first}"
    found = _timed(problem, problem.mode, ready, reasons, device, seconds)
    if device.type == "cuda":
        found += _timed_graphs(problem, ready, device, seconds)
    return found


def _timed(
    problem: Problem,
    mode: str,
    ready: list[tuple[Contender, Call]],
    reasons: dict[str, str],
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """A row for each contender of the problem: timed, or with the reason why not."""
    times = interleave([call for _, call in ready], device, seconds)
    timings = {contender.provider: timing for (contender, _), timing in zip(ready, times, strict=True)}
    peaks = {contender.provider: peak_bytes(call, device) for contender, call in ready}
    blank = _blank(problem, mode, device)
    rows = []
    for contender in problem.contenders:
        name = contender.provider
        row = replace(blank, provider=name, rival="" if contender.is_ours else contender.name, whole=contender.whole)
        if name not in timings:
            rows.append(replace(row, reason=reasons.get(name, "")))
            continue
        row = filled(row, timings[name], peaks[name])
        rows.append(_with_ratios(row, problem.contenders, timings) if contender.is_ours else row)
    return rows


def _blank(problem: Problem, mode: str, device: torch.device) -> Row:
    """What all rows of a problem share."""
    row = Row(problem.op, problem.shape, problem.dtype, problem.layout, "", mode, batch=problem.batch)
    if not problem.flops:
        return row
    limits = ceilings(device, problem.compute)
    return replace(
        row,
        flops=problem.flops,
        moved_bytes=problem.moved,
        ceilings={"flops_per_us": round(limits.flops_per_us, 1), "bytes_per_us": round(limits.bytes_per_us, 1)},
    )


def _timed_graphs(
    problem: Problem, ready: list[tuple[Contender, Call]], device: torch.device, seconds: float
) -> list[Row]:
    reasons: dict[str, str] = {}
    replays: list[tuple[Contender, Call]] = []
    for contender, call in ready:
        try:
            replays.append((contender, captured(call, device)))
        except Exception as error:
            torch.cuda.synchronize(device)
            reasons[contender.provider] = f"can't be captured: {type(error).__name__}"
    return _timed(problem, problem.mode + GRAPH, replays, reasons, device, seconds)


def filled(row: Row, timing: Timing, peak: int | None = None) -> Row:
    """A row with its timing, and the share of the floor where its ceilings are known."""
    floor = Ceilings(**row.ceilings).floor_us(row.flops, row.moved_bytes) if row.ceilings else None
    return replace(
        row,
        median_us=round(timing.median_us, 3),
        p20_us=round(timing.p20_us, 3),
        p80_us=round(timing.p80_us, 3),
        repeats=timing.repeats,
        peak_bytes=peak,
        floor_share=None if floor is None else round(floor / timing.median_us, 4),
    )


def _with_ratios(row: Row, contenders: Sequence[Contender], timings: dict[str, Timing]) -> Row:
    """Our row with its ratio to every rival's best setting, and the best of those who do the whole job."""
    ours = timings[row.provider].median_us
    ratios: dict[str, float] = {}
    whole: dict[str, float] = {}
    for contender in contenders:
        if contender.is_ours or contender.provider not in timings:
            continue
        ratio = round(timings[contender.provider].median_us / ours, 4)
        ratios[contender.name] = min(ratio, ratios.get(contender.name, ratio))
        if contender.whole:
            whole[contender.provider] = ratio
    row = replace(row, ratios=ratios)
    if not whole:
        return row
    best = min(whole, key=whole.__getitem__)
    return replace(row, best_rival=best, headline=whole[best])


# A CUDA graph is measured beside every call anyway, and one inside the compiled code could not be captured again.
_COMPILE_OPTIONS: dict[str, dict[str, Any]] = {COMPILED: {}, MAX_AUTOTUNE: {"mode": "max-autotune-no-cudagraphs"}}


def compiled(function: Callable[[], Result], device: torch.device, setting: str = COMPILED) -> Callable[[], Result]:
    """The function under torch.compile, compiled now.

    Raises:
        NotCompiled: the environment variable FASTVIT_NO_COMPILE is set.
        Unavailable: it can't be compiled here.
    """
    if os.environ.get(NO_COMPILE):
        raise NotCompiled(NOT_COMPILED)
    call = torch.compile(_with_own_code(function), dynamic=False, **_COMPILE_OPTIONS[setting])
    started = time.monotonic()
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # rather than to go on uncompiled
            call()
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unavailable(f"torch.compile failed after {time.monotonic() - started:.0f} s: {first}") from error
    return call


def _with_own_code(function: Callable[[], Result]) -> Callable[[], Result]:
    """A copy of a function. What is compiled is kept by code, a few versions of each, and contenders are closures of
    the same code: sharing it, the later ones would search through the versions of the others, or stay uncompiled."""
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{next(_copies)}")
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
