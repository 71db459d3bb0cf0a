"""75% masked patch embedding: ours projects the kept patches alone; masked autoencoders embed all, then gather."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fastvit.benchmarks import rivals
from fastvit.benchmarks.contenders import Make, Task
from fastvit.benchmarks.patch_embed import ON_CPU, ON_GPU, Shape, task_of, usual_shapes, work
from fastvit.benchmarks.problem import CHANNELS_LAST, COMPILED, Contender, Plan, Problem

MASKED = 0.75
RIVAL = "embed all, gather"
SETTINGS: tuple[tuple[str, Make], ...] = (
    ("conv2d", rivals.conv2d),
    (f"conv2d {CHANNELS_LAST}", functools.partial(rivals.conv2d, channels_last=True)),
    ("linear", rivals.linear),
)


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    on_gpu = device.type == "cuda"
    precisions: tuple[str, ...] = ("uint8 to bfloat16, autocast", "bfloat16") if on_gpu else ON_CPU[:2]
    if size == "full":
        precisions = ON_GPU if on_gpu else ON_CPU
    # Where minutes count, the one rival that is the quickest elsewhere is compiled.
    what = tuple(name for name, _ in SETTINGS) if size == "full" else ("linear",) if size == "small" else ()
    return [
        (f"masked {shape} {precision}", functools.partial(_problems_of, shape, precision, device, what))
        for precision in precisions
        for shape in usual_shapes(size, on_gpu)
    ]


def _problems_of(
    shape: Shape, precision: str, device: torch.device, compile_what: tuple[str, ...]
) -> Iterator[Problem]:
    task = task_of(shape, precision, device, kept=1 - MASKED)
    contenders = functools.partial(_contenders, compile_what=compile_what)
    return task.problems("masked", f"{shape}, {MASKED:.0%} masked", precision, "NCHW", contenders, work)


def _contenders(task: Task, mode: str, compile_what: tuple[str, ...]) -> Iterator[Contender]:
    yield from task.ours(mode)
    for setting, make in SETTINGS:
        yield from task.rival(mode, RIVAL, setting, make, (COMPILED,) if setting in compile_what else ())
