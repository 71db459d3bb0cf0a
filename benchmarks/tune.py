"""Times every candidate for the shapes of a model on this device: what `fastvit tune` runs.

Candidates are the backends that run here, Triton's once for every tile of its forward GEMM and for every way to split
its weight gradient, and PyTorch's own path. Each of ours is held to float64 before it is timed; one that is wrong is
left out, with the reason in the table. They take turns in one process, and the fastest median wins.

A tile is chosen by the forward pass alone, with parameters in the compute dtype, as a model is served. The split is
chosen by forward and backward together, with float32 parameters under autocast, as a model is trained.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvit import functional, tuning
from fastvit.backend import check_known
from fastvit.benchmarks.patch_embed import WIDTHS, check_backend
from fastvit.benchmarks.problem import our_backends, steady
from fastvit.benchmarks.rivals import tensor_of
from fastvit.benchmarks.timing import Call, interleave
from fastvit.tuning import FORWARD, REFERENCE, TRAINING, Choice, Configuration, Problem, Table
from fastvit.validation.cases import AddPositionCase, Case, Inputs, PatchEmbedCase, make_inputs

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
class Candidate:
    """A backend and, of Triton, a configuration."""

    backend: str
    configuration: Configuration = tuning.DEFAULT

    def __str__(self) -> str:
        return ", ".join(part for part in (self.backend, str(self.configuration)) if part)

    def forced(self) -> AbstractContextManager[None]:
        """Its configuration, in place of any table's."""
        return tuning.forced_configuration(self.configuration.tile, self.configuration.programs)


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
        plan = list(_plan(models, scope, image // patch, patch))
        for done, (title, cases, compute) in enumerate(plan):
            if progress:
                progress(done, len(plan), title)
            found = _tune_case(cases, compute, names, where, scope.seconds)
            table = table.merged(replace(table, choices=found))
            gc.collect()
    if progress:
        progress(len(plan), len(plan), "done")
    return table


Cases = dict[str, Case]
"""One call as it is made in each mode."""


def _plan(models: Sequence[str], scope: Scope, grid: int, patch: int) -> Iterator[tuple[str, Cases, torch.dtype]]:
    """Title, cases and compute dtype of every measurement."""
    for model in models:
        for batch in scope.batches:
            size = f"ViT-{model}/{patch}, {grid * grid} patches, batch {batch}"
            for precision in scope.precisions:
                compute, images = PRECISIONS[precision]
                for keep in (None, max(1, grid * grid // 4)) if scope.with_keep else (None,):
                    served = PatchEmbedCase(
                        size,
                        batch=batch,
                        grid=(grid, grid),
                        patch=(patch, patch),
                        width=WIDTHS[model],
                        images=images,
                        normalise=images == "uint8",
                        keep=keep,
                    )
                    trained = replace(served, parameters="masters")
                    title = f"patch_embed {size}, {precision}" + (f", keep {keep}" if keep else "")
                    yield title, {FORWARD: served, TRAINING: trained}, compute
            for compute in dict.fromkeys(PRECISIONS[precision][0] for precision in scope.precisions):
                name = str(compute).removeprefix("torch.")
                tokens = AddPositionCase(size, batch=batch, patches=grid * grid, width=WIDTHS[model])
                cases: Cases = {FORWARD: tokens, TRAINING: replace(tokens, parameters="mixed")}
                yield f"add_position {size}, {name}", cases, compute


def _tune_case(
    cases: Cases, compute: torch.dtype, backends: Sequence[str], device: torch.device, seconds: float
) -> Choices:
    found: Choices = {}
    tile = None
    for mode, case in cases.items():
        inputs = make_inputs(case, compute, device)
        candidates = [c for name in backends for c in _candidates(name, case.op, mode, inputs, tile)]
        choice = _measure(case.op, mode, inputs, candidates, device, seconds)
        tile = choice.configuration.tile
        found.setdefault(_problem(case.op, mode, inputs), {})[tuning.bucket(_rows(inputs))] = choice
    return found


def _candidates(backend: str, op: str, mode: str, inputs: Inputs, tile: str | None) -> Iterator[Candidate]:
    """A backend's configurations: tiles in forward mode, splits of the weight gradient, with that tile, in training."""
    if backend != "triton" or op != "patch_embed":
        yield Candidate(backend)
        return
    from fastvit.kernels.patch_embed import forward_tiles
    from fastvit.kernels.row_sums import TARGET_PROGRAMS

    if mode == FORWARD:
        images, weight = tensor_of(inputs, "images"), tensor_of(inputs, "weight")
        for name in forward_tiles(images, weight, inputs.compute, inputs.out):
            yield Candidate(backend, Configuration(tile=name))
    else:
        for programs in (TARGET_PROGRAMS // 2, TARGET_PROGRAMS, 2 * TARGET_PROGRAMS):
            yield Candidate(backend, Configuration(tile, programs))


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
    """What is timed: forward without gradients, or forward and the gradients of everything but the images."""
    tensors = {name: None if tensor is None else tensor.detach() for name, tensor in inputs.tensors.items()}
    leaves = [tensor for name, tensor in tensors.items() if tensor is not None and name != "images"]
    device_type = inputs.grad.device.type

    def tokens() -> Tensor:
        with torch.autocast(device_type, inputs.compute, enabled=inputs.autocast):
            return _run(op, inputs, tensors, candidate.backend)

    def forward() -> object:
        with torch.no_grad(), candidate.forced():
            return tokens()

    def forward_and_backward() -> object:
        with candidate.forced():
            return torch.autograd.grad(tokens(), leaves, inputs.grad)

    if mode == FORWARD:
        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    return forward_and_backward


def _run(op: str, inputs: Inputs, tensors: Mapping[str, Tensor | None], backend: str) -> Tensor:
    if op == "patch_embed":
        normalisation = {"mean": inputs.mean, "std": inputs.std}
        return functional.patch_embed(**tensors, **normalisation, keep=inputs.keep, backend=backend)  # type: ignore[arg-type]
    return functional.add_position(**tensors, backend=backend)  # type: ignore[arg-type]


def _problem(op: str, mode: str, inputs: Inputs) -> Problem:
    """What `functional` looks up for the call."""
    if op == "patch_embed":
        images, weight = tensor_of(inputs, "images"), tensor_of(inputs, "weight")
        return Problem(op, mode, images.dtype, inputs.compute, inputs.out, tuple(weight.shape), inputs.keep is not None)
    tokens, positions = tensor_of(inputs, "tokens"), tensor_of(inputs, "pos_embed")
    return Problem(op, mode, tokens.dtype, positions.dtype, inputs.out, (tokens.shape[2],), False)


def _rows(inputs: Inputs) -> int:
    """B·N."""
    prefix = inputs.tensors["prefix"]
    batch, length, _ = inputs.grad.shape
    return batch * (length - (0 if prefix is None else prefix.shape[0]))
