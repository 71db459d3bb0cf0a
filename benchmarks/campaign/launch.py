"""Stage launch: what a call costs the host, on tensors so small that the GPU has next to nothing to do.

From the call to its return, the GPU not waited for: of the public function by each backend, of the extension's op
alone, given what the public function gives it, and of `torch.add` for scale.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastvit import functional
from fastvit.benchmarks.campaign.output import COMMAND, append, backends_of, print_table, report, why_not
from fastvit.benchmarks.contenders import check_backend
from fastvit.benchmarks.problem import BOTH, FORWARD, filled
from fastvit.benchmarks.rows import OURS, Row, circumstances, grouped, time_table, time_text
from fastvit.benchmarks.timing import WARM_UP, Call, in_turns
from fastvit.validation import AddPositionCase, Case, Inputs, PatchEmbedCase, make_inputs
from fastvit.validation.ops import OPS, Tensors, arguments
from fastvit.validation.report import FAILED, PASSED

OP, SCALE, CUDA, ALONE = "launch", "torch.add", f"{OURS}cuda", f"{OURS}cuda (op alone)"
CALLS = 50  # between two waits for the GPU: far fewer than its queue holds
ROUNDS = 20
CASES: tuple[Case, ...] = (
    PatchEmbedCase("patch_embed, 1 raw image of 32 x 32", batch=1, width=192, images="uint8", normalise=True),
    AddPositionCase("add_position, 1 image of 4 tokens", batch=1, patches=4, width=192),
)


def launch(out: Path, device: str = "cuda", rounds: int = ROUNDS) -> str:
    """Forward without gradients, and forward and backward; a row for each who is called."""
    backends = backends_of(device)
    rows: list[Row] = []
    for case in CASES:
        for mode in (FORWARD, BOTH):
            found = measure(case, mode, backends, torch.device(device), rounds)
            append(out / "bench.jsonl", (row.to_json() for row in found))
            rows += found
            report(figure="; ".join(summary(rows)))
    print_table(lambda: time_table(rows))
    not_timed = [row for row in rows if row.reason]
    for row in not_timed:
        print(f"not timed: {row.provider}, {row.shape}, {row.mode}: {row.reason}")
    return PASSED if backends and all(row.provider == ALONE for row in not_timed) else FAILED


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The forward times of each op."""
    for shape, mine in grouped((row for row in rows if row.mode == FORWARD), lambda row: row.shape).items():
        times = ", ".join(f"{row.provider.removeprefix(OURS)} {time_text(row.median_us)}" for row in mine)
        yield f"{shape.partition(',')[0]}: {times}"


def measure(case: Case, mode: str, backends: Sequence[str], device: torch.device, rounds: int) -> list[Row]:
    """Ours by each backend, each checked first, the extension's op and `torch.add`, in turn."""
    inputs = make_inputs(case, torch.bfloat16, device)
    reasons = {f"{OURS}{backend}": check_backend(backend, case.op, inputs, device) for backend in backends}
    reasons[ALONE] = reasons[CUDA] if CUDA in reasons else why_not("cuda", device.type)
    calls: dict[str, Call] = {}
    for backend in backends:
        if not reasons[f"{OURS}{backend}"]:
            calls[f"{OURS}{backend}"] = _in_mode(mode, inputs, functools.partial(_public, case.op, inputs, backend))
    if CUDA in calls:
        calls[ALONE] = _ops_alone(calls[CUDA])
    calls[SCALE] = _in_mode(mode, inputs, lambda tensors: functools.partial(torch.add, *2 * [tensors["pos_embed"]]))
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times = in_turns([*calls.values()], functools.partial(_host_us, device), rounds)
    about = circumstances(device, command=f"{COMMAND}{OP}")
    blank = Row(OP, case.name, "bfloat16", "", "", mode, **about)
    rows = {name: replace(blank, provider=name, whole=name != ALONE, reason=why) for name, why in reasons.items()}
    rows[SCALE] = replace(blank, provider=SCALE, whole=False, rival=SCALE)
    rows |= {name: filled(rows[name], timing) for name, timing in zip(calls, times, strict=True)}
    return list(rows.values())


def _host_us(device: torch.device, call: Call) -> float:
    """Microseconds of host time of one call: the mean of CALLS calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - started) / 1000 / CALLS


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
    return lambda: torch.autograd.grad(call(), parameters, grad, allow_unused=True)


def _public(op: str, inputs: Inputs, backend: str, tensors: Tensors) -> Callable[[], Tensor]:
    positional, named = arguments(op, inputs, tensors)
    return functools.partial(getattr(functional, op), *positional, **named, backend=backend)


def _ops_alone(call: Call) -> Call:
    """The ops of the extension that a call makes, with the arguments that it gives them."""
    made: list[Call] = []

    def noting(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            detached = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
            made.append(functools.partial(op, *detached))
            return op(*arguments)

        return run

    with contextlib.ExitStack() as stack:
        for name in (f"{op}{direction}_cuda" for op in OPS for direction in ("", "_backward")):
            op = getattr(torch.ops.fastvit, name)
            stack.enter_context(mock.patch.object(torch.ops.fastvit, name, noting(op)))
        call()

    def alone() -> None:
        for op in made:
            op()

    return alone
