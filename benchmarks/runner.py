"""Runs benchmark suites: `run_suites`, what `fastvit bench` and the demo call."""

from __future__ import annotations

import gc
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fastvit.benchmarks import accelerated, input, masked, model, packed
from fastvit.benchmarks.problem import Plan, Problem, check_size, measure, steady
from fastvit.benchmarks.rows import Row, circumstances, command_line, format_table, write_json_lines
from fastvit.discovery import Declared
from fastvit.validation.ops import OPS

__all__ = ["SUITES", "format_table", "run_plan", "run_suites", "write_json_lines"]

_WIDER: dict[str, Callable[[str, torch.device], Plan]] = {
    "masked": masked.plan,
    "packed": packed.plan,
    "model": model.plan,
    "input": input.plan,
    "accelerated": accelerated.plan_tokens,
    "accelerated_model": accelerated.plan_model,
}
# Those of the ops, each the `plan` in the file of its name, and what is wider than an op.
SUITES = ChainMap(_WIDER, Declared("fastvit.benchmarks", "plan", among=OPS))  # type: ignore[arg-type]
SECONDS = {"tiny": 0.02, "small": 2.0, "full": 6.0}  # timing of one problem, all contenders together
Progress = Callable[[int, int, str], None]


def run_suites(
    names: Sequence[str] | None = None,
    size: str = "small",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    *,
    on_rows: Callable[[list[Row]], None] | None = None,
    only: Callable[[Problem], bool] | None = None,
    seconds: float | None = None,
    threads: int | None = None,
) -> list[Row]:
    """Time our backends beside their rivals, each case checked in this process before it is timed.

    Args:
        names: of SUITES; default: all.
        size: "small" (minutes), "full" (every published shape, compiled rivals too), or "tiny" (shows that all runs;
            its times mean nothing).
        device: default: CUDA where there is one, else the CPU.
        progress: called as progress(done, total, description) before each case and at the end.
        on_rows: called with the rows of each case as they come, so that a cut-off loses nothing.
        only: which problems are measured; default: all.
        seconds: to spend on timing each case; default: by size.
        threads: of the CPU; default: torch's setting.

    Returns:
        A row for each provider in each case, those that did not run included, with the reason.

    Raises:
        ValueError: an unknown suite or size.
    """
    check_size(size)
    chosen = list(names) if names else list(SUITES)
    for name in chosen:
        if name not in SUITES:
            raise ValueError(f"suites: unknown suite {name!r}; known: {', '.join(SUITES)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan = [case for name in chosen for case in SUITES[name](size, where)]
    return run_plan(plan, where, seconds or SECONDS[size], progress, on_rows=on_rows, only=only, threads=threads)


def run_plan(
    plan: Plan,
    device: torch.device,
    seconds: float,
    progress: Progress | None = None,
    *,
    on_rows: Callable[[list[Row]], None] | None = None,
    only: Callable[[Problem], bool] | None = None,
    threads: int | None = None,
) -> list[Row]:
    """`run_suites` for a plan of one's own choice."""
    rows: list[Row] = []
    with steady(device, threads):
        stamp = circumstances(device, command=command_line())
        for done, (title, problems) in enumerate(plan):
            if progress:
                progress(done, len(plan), title)
            for problem in problems():
                if only and not only(problem):
                    continue
                found = [replace(row, **stamp) for row in measure(problem, device, seconds)]
                rows += found
                if on_rows:
                    on_rows(found)
            gc.collect()
    if progress:
        progress(len(plan), len(plan), "done")
    return rows
