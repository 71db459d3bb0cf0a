"""Times every candidate for the shapes of a model on this device: what `fastvit tune` runs.

Candidates are the backends that run here, Triton's once for every tile of its forward GEMM and for every tile and split
of its weight gradient, and PyTorch's own path. Each of ours is held to float64 before it is timed; one that is wrong is
left out, with the reason in the table. They take turns in one process, and the fastest median wins.

A tile is chosen by the forward pass alone, with parameters in the compute dtype, as a model is served. The split is
chosen by forward and backward together, with float32 parameters under autocast, as a model is trained.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastvit import tuning
from fastvit.backend import check_known, has_op
from fastvit.benchmarks.contenders import check_backend, ours, timed_call, trained
from fastvit.benchmarks.problem import WIDTHS, our_backends, steady
from fastvit.benchmarks.rivals import Solution
from fastvit.benchmarks.timing import Call, interleave
from fastvit.discovery import Declared
from fastvit.tuning import REFERENCE, Choice, Configuration, Problem, Table
from fastvit.validation import Case, Inputs, make_inputs
from fastvit.validation.ops import OPS, heaviest_first

# label → (compute dtype, dtype of the images)
PRECISIONS = {
    "uint8 to bfloat16": (torch.bfloat16, "uint8"),
    "bfloat16": (torch.bfloat16, "same"),
    "uint8 to float32": (torch.float32, "uint8"),
    "float32": (torch.float32, "same"),
    "float32 to bfloat16": (torch.bfloat16, "float32"),
    "uint8 to float16": (torch.float16, "uint8"),
    "float16": (torch.float16, "same"),
}
Progress = Callable[[int, int, str], None]
Choices = tuning.Choices


@dataclass(frozen=True)
class Scope:
    """Which batches and precisions are measured, for how many seconds each, and whether with `keep` too."""

    batches: Sequence[int]
    precisions: Sequence[str]
    seconds: float
    with_keep: bool = False


def scope_of(device: torch.device, quick: bool) -> Scope:
    """What is measured on a device unless it is said otherwise."""
    precisions = list(PRECISIONS)
    if device.type == "cuda":
        return Scope((8, 256), precisions[:2], 0.3) if quick else Scope((1, 8, 64, 256), precisions, 1.0, True)
    return Scope((8,), precisions[2:4], 0.3) if quick else Scope((1, 16), precisions[:4], 1.0, True)


@dataclass(frozen=True)
class Size:
    """A model and a batch, the grid and the patch being squares."""

    model: str
    batch: int
    grid: int
    patch: int

    @property
    def width(self) -> int:
        return WIDTHS[self.model]

    @property
    def patches(self) -> int:
        return self.grid**2

    def __str__(self) -> str:
        return f"ViT-{self.model}/{self.patch}, {self.patches} patches, batch {self.batch}"


@dataclass(frozen=True)
class Measurement:
    """One call, as it is made in each mode."""

    title: str
    cases: Mapping[str, Case]
    compute: torch.dtype


@dataclass(frozen=True)
class Tuned:
    """What the benchmark of an op declares of it, as `TUNED`.

    `measurements(size, scope)` are the calls to measure, `problem(mode, inputs)` is what `fastvit.functional` looks up
    for one, and `configurations(mode, inputs, tile)` are those of Triton to choose from, in training with the tile that
    was best in forward. `yardstick(inputs)` does a part of the job alone.
    """

    measurements: Callable[[Size, Scope], Iterator[Measurement]]
    problem: Callable[[str, Any], Problem]
    configurations: Callable[[str, Any, str | None], Iterable[Configuration]] = lambda *_: (tuning.DEFAULT,)
    yardstick: Callable[[Any], Solution] | None = None


TUNED: Mapping[str, Tuned] = Declared("fastvit.benchmarks", "TUNED", among=OPS)


@dataclass(frozen=True)
class Candidate:
    """A backend and, of Triton, a configuration."""

    backend: str
    configuration: Configuration = tuning.DEFAULT

    def __str__(self) -> str:
        return ", ".join(part for part in (self.backend, str(self.configuration)) if part)

    def forced(self) -> AbstractContextManager[None]:
        """Its configuration, in place of any table's."""
        return tuning.forced_configuration(**asdict(self.configuration))


def tune(
    device: str | torch.device | None = None,
    models: Sequence[str] = ("S", "B"),
    quick: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    *,
    backends: Sequence[str] | None = None,
    scope: Scope | None = None,
    image: int = 224,
    patch: int = 16,
) -> Table:
    """Measure what is fastest on a device; nothing is written (see `Table.save`), nor used in this process.

    Args:
        device: default: CUDA where there is one, else the CPU.
        models: of Ti, S, B and L, whose widths are measured.
        quick: fewer batches and precisions.
        progress: called as progress(done, total, description) before each case and at the end.
        threads: of the CPU; default: torch's setting. A table holds for this number of threads.
        backends: candidates beside PyTorch's own path; default: all that run here at full speed.
        scope: batches, precisions and seconds of one's own choice.
        image, patch: sides of images and patches, in pixels.

    Raises:
        ValueError: an unknown model, precision or backend.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scope = scope or scope_of(where, quick)
    for kind, names, known in (("models", models, WIDTHS), ("precisions", scope.precisions, PRECISIONS)):
        for name in names:
            if name not in known:
                raise ValueError(f"{kind}: unknown {name!r}; known: {', '.join(known)}")
    for name in backends or ():
        check_known(name, "backends")
    names = [name for name in (our_backends(where) if backends is None else backends) if name != REFERENCE]
    with steady(where, threads):
        table = Table(tuning.device_name(where), tuning.current_versions())
        plan = _plan(models, scope, image // patch, patch, names)
        for done, (op, measurement) in enumerate(plan):
            if progress:
                progress(done, len(plan), measurement.title)
            found = _tune_case(op, measurement, names, where, scope.seconds)
            table = table.merged(replace(table, choices=found))
            gc.collect()
    if progress:
        progress(len(plan), len(plan), "done")
    return table


def _plan(
    models: Sequence[str], scope: Scope, grid: int, patch: int, backends: Sequence[str]
) -> list[tuple[str, Measurement]]:
    """The op and the calls of every measurement, of the ops that one of the backends has."""
    sizes = [Size(model, batch, grid, patch) for model in models for batch in scope.batches]
    ops = [op for op in heaviest_first() if op in TUNED and any(has_op(name, op) for name in backends)]
    return [(op, found) for size in sizes for op in ops for found in TUNED[op].measurements(size, scope)]


def _tune_case(
    op: str, measurement: Measurement, backends: Sequence[str], device: torch.device, seconds: float
) -> Choices:
    found: Choices = {}
    tile = None
    for mode, case in measurement.cases.items():
        inputs = make_inputs(case, measurement.compute, device)
        candidates = []
        for backend in backends:
            own = TUNED[op].configurations(mode, inputs, tile) if backend == "triton" else (tuning.DEFAULT,)
            candidates += [Candidate(backend, configuration) for configuration in own]
        choice = _measure(op, mode, inputs, candidates, device, seconds)
        tile = choice.configuration.tile
        found.setdefault(TUNED[op].problem(mode, inputs), {})[tuning.bucket(inputs.rows)] = choice
    return found


def _measure(
    op: str, mode: str, inputs: Inputs, candidates: Sequence[Candidate], device: torch.device, seconds: float
) -> Choice:
    """Check our candidates, then time those that are right in turn with PyTorch's own path."""
    excluded: dict[str, str] = {}
    calls: dict[Candidate, Call] = {Candidate(REFERENCE): _call(Candidate(REFERENCE), op, mode, inputs)}
    for candidate in candidates:
        with candidate.forced():
            reason = check_backend(candidate.backend, op, inputs, device)
        if reason:
            excluded[str(candidate)] = reason
        else:
            calls[candidate] = _call(candidate, op, mode, inputs)
    timings = interleave(list(calls.values()), device, seconds)
    times = {candidate: round(timing.median_us, 2) for candidate, timing in zip(calls, timings, strict=True)}
    return fastest(times, excluded)


def fastest(times: Mapping[Candidate, float], excluded: Mapping[str, str]) -> Choice:
    """The choice between candidates by their times in microseconds; a tie goes to PyTorch's own path."""
    best = min(times, key=lambda candidate: (times[candidate], candidate.backend != REFERENCE))
    triton = [candidate for candidate in times if candidate.backend == "triton"]
    return Choice(
        best.backend,
        {str(candidate): time for candidate, time in times.items()},
        min(triton, key=times.__getitem__).configuration if triton else tuning.DEFAULT,
        excluded,
    )


def _call(candidate: Candidate, op: str, mode: str, inputs: Inputs) -> Call:
    """What is timed: forward without gradients, or forward and the gradients of all parameters."""
    call = timed_call(ours(op, trained(inputs), candidate.backend), inputs.grads.values(), mode)

    def forced() -> object:
        with candidate.forced():
            return call()

    return forced
