"""75% masked patch embedding: ours projects the kept patches alone; masked autoencoders embed all, then gather."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fastvit.benchmarks import rivals
from fastvit.benchmarks.patch_embed import (
    ON_CPU,
    ON_GPU,
    Make,
    Shape,
    TrueError,
    contender,
    embedding_problems,
    inputs_of,
    our_contenders,
    usual_shapes,
)
from fastvit.benchmarks.problem import CHANNELS_LAST, COMPILED, Contender, Plan, Problem
from fastvit.validation.cases import Inputs

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
    inputs = inputs_of(shape, precision, device, kept=1 - MASKED)
    contenders = functools.partial(_contenders, compile_what=compile_what)
    name = f"{shape}, {MASKED:.0%} masked"
    return embedding_problems("masked", name, precision, "NCHW", inputs, device, contenders)


def _contenders(
    inputs: Inputs, mode: str, device: torch.device, true_error: TrueError, compile_what: tuple[str, ...]
) -> Iterator[Contender]:
    yield from our_contenders(inputs, mode, device)
    for setting, make in SETTINGS:
        hows = (COMPILED,) if setting in compile_what else ()
        yield from contender(RIVAL, setting, make, inputs, mode, device, true_error, hows)
