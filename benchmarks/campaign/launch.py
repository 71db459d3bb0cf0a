"""Stage launch: what a call costs the host, on tensors so small that the GPU has next to nothing to do.

From the call to its return, the GPU not waited for: of the public function by each backend, and of `torch.add` for
scale.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastvit.benchmarks.campaign.output import COMMAND, all_timed, append, backends_of, print_table, report
from fastvit.benchmarks.contenders import check_backend, ours, timed_call, trained
from fastvit.benchmarks.problem import BOTH, FORWARD, filled
from fastvit.benchmarks.rivals import Solution
from fastvit.benchmarks.rows import OURS, Row, circumstances, grouped, time_table, time_text
from fastvit.benchmarks.timing import WARM_UP, Call, in_turns
from fastvit.validation import AddPositionCase, Case, PatchEmbedCase, make_inputs
from fastvit.validation.report import FAILED, PASSED

OP, SCALE = "launch", "torch.add"
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
    return PASSED if all_timed([row for row in rows if row.reason]) and backends else FAILED


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The forward times of each op."""
    for shape, mine in grouped((row for row in rows if row.mode == FORWARD), lambda row: row.shape).items():
        times = ", ".join(f"{row.provider.removeprefix(OURS)} {time_text(row.median_us)}" for row in mine)
        yield f"{shape.partition(',')[0]}: {times}"


def measure(case: Case, mode: str, backends: Sequence[str], device: torch.device, rounds: int) -> list[Row]:
    """Ours by each backend, each checked first, and `torch.add`, in turn."""
    inputs = make_inputs(case, torch.bfloat16, device)
    reasons = {backend: check_backend(backend, case.op, inputs, device) for backend in backends}
    calls = {
        f"{OURS}{backend}": timed_call(ours(case.op, trained(inputs), backend), inputs.grads.values(), mode)
        for backend in backends
        if not reasons[backend]
    }
    table = trained(inputs)["pos_embed"]
    addition = Solution(functools.partial(torch.add, table, table), [table])
    calls[SCALE] = timed_call(addition, [torch.ones_like(table)], mode)
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times = in_turns([*calls.values()], functools.partial(_host_us, device), rounds)
    about = circumstances(device, command=f"{COMMAND}{OP}")
    blank = Row(OP, case.name, "bfloat16", "", "", mode, **about)
    rows = {f"{OURS}{name}": replace(blank, provider=f"{OURS}{name}", reason=why) for name, why in reasons.items()}
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
