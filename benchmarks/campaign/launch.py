"""Stage launch: what a call costs the host, on tensors so small that the GPU has next to nothing to do.

From the call to its return, the GPU not waited for: of the public function by each backend, of the extension's op
alone, given what the public function gives it, and of `torch.add` for scale.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit import functional
from fastvit.backend import available_backends, multiplies_at_tf32
from fastvit.benchmarks.campaign.backends import backends_of
from fastvit.benchmarks.campaign.ceilings import COMMAND
from fastvit.benchmarks.campaign.output import Lines, passed_if, print_table, report
from fastvit.benchmarks.patch_embed import check_backend
from fastvit.benchmarks.problem import BOTH, FORWARD, filled
from fastvit.benchmarks.rows import OURS, Row, commit, device_name, time_table, time_text, versions
from fastvit.benchmarks.timing import WARM_UP, Call, Timing
from fastvit.cuda import patch_embed as extension
from fastvit.validation.cases import AddPositionCase, Case, Inputs, PatchEmbedCase, make_inputs

OP, SCALE, ALONE = "launch", "torch.add", f"{OURS}cuda (op alone)"
CALLS = 50  # between two waits for the GPU: far fewer than its queue holds
ROUNDS = 20
CASES: tuple[Case, ...] = (
    PatchEmbedCase("patch_embed, 1 raw image of 32 x 32", batch=1, width=192, images="uint8", normalise=True),
    AddPositionCase("add_position, 1 image of 4 tokens", batch=1, patches=4, width=192),
)


def launch(out: Path, device: str = "cuda", rounds: int = ROUNDS) -> str:
    """Forward without gradients, and forward and backward; a row for each who is called."""
    lines, where = Lines(out / "bench.jsonl"), torch.device(device)
    backends = backends_of(device)
    rows: list[Row] = []
    for case in CASES:
        for mode in (FORWARD, BOTH):
            found = measure(case, mode, backends, where, rounds)
            lines.write(row.to_json() for row in found)
            rows += found
            report(figure="; ".join(summary(rows)))
    print_table(lambda: time_table(rows))
    failed = [row for row in rows if row.reason and row.provider != ALONE]
    for row in rows:
        if row.reason:
            print(f"not timed: {row.provider}, {row.shape}, {row.mode}: {row.reason}")
    return passed_if(bool(backends) and not failed)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The forward times of each op."""
    for shape in dict.fromkeys(row.shape for row in rows):
        mine = [row for row in rows if (row.shape, row.mode) == (shape, FORWARD)]
        times = ", ".join(f"{row.provider.removeprefix(OURS)} {time_text(row.median_us)}" for row in mine)
        yield f"{shape.partition(',')[0]}: {times}"


def measure(case: Case, mode: str, backends: Sequence[str], device: torch.device, rounds: int) -> list[Row]:
    """Ours by each backend, each checked first, the extension's op and `torch.add`, in turn."""
    inputs = make_inputs(case, torch.bfloat16, device)
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for backend in backends:
        reasons[f"{OURS}{backend}"] = check_backend(backend, case.op, inputs, device)
        calls[f"{OURS}{backend}"] = _in_mode(mode, inputs, functools.partial(_public, case.op, inputs, backend))
    reasons[ALONE] = reasons.get(f"{OURS}cuda", "") or available_backends(device)["cuda"]
    if not reasons[ALONE]:
        calls[ALONE] = _alone(case.op, mode, inputs)
    calls[SCALE] = _in_mode(mode, inputs, lambda tensors: functools.partial(torch.add, *2 * [tensors["pos_embed"]]))
    calls = {name: call for name, call in calls.items() if not reasons.get(name)}
    times = dict(zip(calls, host_times(list(calls.values()), device, rounds), strict=True))
    blank = Row(
        OP, case.name, "bfloat16", "", "", mode,
        device=device_name(device), versions=versions(device.type), commit=commit(), command=f"{COMMAND}{OP}",
    )  # fmt: skip
    rows = []
    for name in [*reasons, SCALE]:
        row = replace(blank, provider=name, rival=name if name == SCALE else "", whole=name not in (ALONE, SCALE))
        rows.append(filled(row, times[name]) if name in times else replace(row, reason=reasons[name]))
    return rows


def host_times(calls: Sequence[Call], device: torch.device, rounds: int) -> list[Timing]:
    """Microseconds of host time of one call, of each in turn: the mean of CALLS calls, in every round."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(WARM_UP):
            call()
    for number in range(rounds):
        for place in range(len(calls)):
            index = (place + number) % len(calls)
            call = calls[index]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            samples[index].append((time.perf_counter_ns() - started) / 1000 / CALLS)
    return [Timing.of(values) for values in samples]


Tensors = dict[str, Any]


def _in_mode(mode: str, inputs: Inputs, make: Callable[[Tensors], Callable[[], Tensor]]) -> Call:
    """The call on tensors that want no gradients, or the call and the gradients of all parameters."""
    leaves = {name: None if tensor is None else tensor.detach() for name, tensor in inputs.tensors.items()}
    parameters = [tensor for name, tensor in leaves.items() if tensor is not None and name not in ("images", "tokens")]
    call = make(leaves)
    if mode == FORWARD:
        return call
    for parameter in parameters:
        parameter.requires_grad_()
    grad = torch.ones_like(call())

    def forward_and_backward() -> object:
        return torch.autograd.grad(call(), parameters, grad, allow_unused=True)

    return forward_and_backward


def _public(op: str, inputs: Inputs, backend: str, tensors: Tensors) -> Callable[[], Tensor]:
    pos_embed, prefix = tensors["pos_embed"], tensors["prefix"]
    if op == "add_position":
        return functools.partial(functional.add_position, tensors["tokens"], pos_embed, prefix=prefix, backend=backend)
    return functools.partial(
        functional.patch_embed, tensors["images"], tensors["weight"], tensors["bias"], pos_embed=pos_embed,
        prefix=prefix, mean=inputs.mean, std=inputs.std, backend=backend,
    )  # fmt: skip


def _alone(op: str, mode: str, inputs: Inputs) -> Call:
    """The extension's op, in the second mode with its backward op."""
    forward, backward = (_add_position_ops if op == "add_position" else _patch_embed_ops)(inputs)

    def both() -> None:
        forward()
        backward()

    return forward if mode == FORWARD else both


def _add_position_ops(inputs: Inputs) -> tuple[Call, Call]:
    ops, tensors = torch.ops.fastvit, inputs.tensors
    arguments = (tensors["tokens"], tensors["pos_embed"], tensors["prefix"], inputs.out)
    return (
        functools.partial(ops.add_position_cuda, *arguments),
        functools.partial(ops.add_position_backward_cuda, inputs.grad),
    )


def _patch_embed_ops(inputs: Inputs) -> tuple[Call, Call]:
    ops = torch.ops.fastvit
    images, weight, bias, pos_embed, prefix = (
        inputs.tensors[name] for name in ("images", "weight", "bias", "pos_embed", "prefix")
    )
    assert images is not None and weight is not None and prefix is not None
    normalisation, precision = (inputs.mean, inputs.std), multiplies_at_tf32(inputs.compute)
    needs = (False, True, True, True)
    given: list[tuple[Any, ...]] = []

    def note(*arguments: Any) -> Any:
        given.append(arguments)
        return (images,) * len(needs)

    extension.run_forward(
        note, images, weight, bias, pos_embed, prefix, *normalisation, None, inputs.compute, inputs.out, tf32=precision
    )
    extension.run_backward(
        note, inputs.grad, images, weight, *normalisation, None, inputs.compute, prefix.shape[0], needs, tf32=precision
    )
    to_forward, to_backward = given
    return (
        functools.partial(ops.patch_embed_cuda, *to_forward),
        functools.partial(ops.patch_embed_backward_cuda, *to_backward),
    )
