"""Stages ceilings, sweep, tune, profile and one for each suite: how fast this GPU is at best, how fast we and others
are on it, and where the time goes. Rows are written as they come.

The suites run without torch.compile. The stage `compiled` measures the cases that have compiled contenders once more,
with everybody in them, so that the best rival is the best of all; a cut-off there loses none of the other rows.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastvit.benchmarks import sweep as sweeper
from fastvit.benchmarks import tune as tuner
from fastvit.benchmarks.campaign.output import (
    COMMAND,
    all_timed,
    append,
    backends_of,
    print_table,
    progress,
    report,
    skipped,
)
from fastvit.benchmarks.problem import COMPILED, GRAPH, NO_COMPILE, NOT_COMPILED, NotCompiled, Problem, filled
from fastvit.benchmarks.profiling import OURS as OUR_MODEL
from fastvit.benchmarks.profiling import Setup, profile
from fastvit.benchmarks.profiling import format_table as profile_table
from fastvit.benchmarks.rows import OURS, Row, circumstances, format_table, grouped
from fastvit.benchmarks.runner import run_suites
from fastvit.benchmarks.timing import Call, float32_products, interleave
from fastvit.tuning import Table
from fastvit.validation.report import FAILED, PASSED

CEILINGS = (("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee"))  # dtype, how products of float32 are made
SECONDS = 0.4  # of timing for each problem of a suite, all contenders together
WITH_COMPILED = ("patch_embed", "add_position", "model", "input", "masked")
TUNED = PROFILED = ("S", "B")  # models
BATCH, RIVAL = 256, "timm"  # of profiles


def ceilings(out: Path, device: str = "cuda", size: int = 8192, values: int = 2**28, seconds: float = 0.5) -> str:
    """Square matrix products of `size`, and a copy of `values` fp32 numbers, `seconds` of each."""
    where, words = torch.device(device), []
    about = circumstances(where, command=f"{COMMAND}ceilings")

    def measure(row: Row, call: Call, precision: str = "ieee") -> None:
        with float32_products(precision):
            (timing,) = interleave([call], where, seconds)
        append(out / "bench.jsonl", [filled(row, timing).to_json()])
        gigas = (row.flops or row.moved_bytes) / timing.median_us / 1e3
        words.append(f"{row.dtype} {gigas / 1e3:.1f} TFLOP/s" if row.flops else f"{row.mode} {gigas:.0f} GB/s")
        print(words[-1], flush=True)
        report(figure="; ".join(words))

    for name, precision in CEILINGS:
        left, right, product = (torch.randn(size, size, device=where, dtype=getattr(torch, name)) for _ in range(3))
        dtype = name if name != "float32" else f"{name}, {precision}"
        row = Row("ceiling", f"{size} x {size} x {size}", dtype, "", "torch", "product", flops=2.0 * size**3, **about)
        measure(row, functools.partial(torch.mm, left, right, out=product), precision)
    source = torch.rand(values, device=where)
    row = Row("ceiling", f"{values} values", "float32", "", "torch", "copy", moved_bytes=8.0 * values, **about)
    measure(row, functools.partial(torch.empty_like(source).copy_, source))
    return PASSED


def suite(out: Path, name: str, device: str = "cuda", size: str = "small", seconds: float = SECONDS) -> str:
    """One suite; fails where one of ours was not timed, because its results are wrong or it did not run."""
    return _measure(name, [name], out, device, size, seconds)


def compiled(
    out: Path, device: str = "cuda", size: str = "small", seconds: float = SECONDS,
    names: Sequence[str] = WITH_COMPILED, most: int = sys.maxsize,
) -> str:  # fmt: skip
    """The first so many cases of suites that have compiled contenders; skipped where FASTVIT_NO_COMPILE is set."""
    found = itertools.count()

    def is_wanted(problem: Problem) -> bool:
        return any(COMPILED in contender.setting for contender in problem.contenders) and next(found) < most

    if os.environ.get(NO_COMPILE):
        return skipped(NOT_COMPILED)
    return _measure("compiled", names, out, device, size, seconds, is_wanted)


def _measure(
    stage: str, names: Sequence[str], out: Path, device: str, size: str, seconds: float,
    only: Callable[[Problem], bool] | None = None,
) -> str:  # fmt: skip
    rows: list[Row] = []

    def keep(found: Sequence[Row]) -> None:
        found = [replace(row, command=f"{COMMAND}{stage}") for row in found]
        append(out / "bench.jsonl", (row.to_json() for row in found))
        rows.extend(found)
        report(figure=headline(rows))

    run_suites(names, size, device, progress, on_rows=keep, only=only, seconds=seconds)
    print_table(lambda: format_table(rows))
    return PASSED if all_timed(not_timed(rows)) and any(row.is_ours for row in rows) else FAILED


def not_timed(rows: Sequence[Row]) -> list[Row]:
    """Our rows that ought to have a time. What can't be captured as a CUDA graph is no failure, nor what was not to be
    compiled."""
    missing = [row for row in rows if row.is_ours and row.median_us is None and row.reason != NOT_COMPILED]
    return [row for row in missing if not row.mode.endswith(GRAPH)]


def headline(rows: Sequence[Row]) -> str:
    """How many cases, the worst and best ratio of the fastest of ours to the best rival, which case is the worst, and
    how often each of ours is the fastest.

    Judged by CUDA graphs, where there are any: what is launched one by one is over before the host has launched it all.
    """
    cases = grouped(rows, lambda row: row.case)
    words = [f"{len(cases)} case{'' if len(cases) == 1 else 's'}"]
    ratios = [row for row in rows if row.headline is not None]
    judged = grouped([row for row in ratios if row.mode.endswith(GRAPH)] or ratios, lambda row: row.case)
    fastest = [max(mine, key=_ratio) for mine in judged.values()]
    if fastest:
        worst, best = min(fastest, key=_ratio), max(fastest, key=_ratio)
        words.append(f"{_ratio(worst):.2f}x to {_ratio(best):.2f}x the best rival")
        words.append(f"worst: {worst.best_rival}, {worst.shape}, {worst.dtype}, {worst.mode}")
    if len({row.provider for mine in judged.values() for row in mine}) > 1:
        wins = Counter(row.provider.removeprefix(OURS) for row in fastest)
        words.append("fastest of ours: " + ", ".join(f"{name} {count}" for name, count in wins.most_common()))
    missing = len(not_timed(rows))
    return "; ".join([*words, *([f"{missing} not timed"] if missing else [])])


def _ratio(row: Row) -> float:
    return row.headline or 0.0


def sweep(out: Path, device: str = "cuda", **sizes: Any) -> str:
    """Each kernel in every variant; fails where one of them is wrong, or on a GPU was not timed."""

    def keep(found: Sequence[Row]) -> None:
        append(out / "bench.jsonl", (row.to_json() for row in found))
        progress(len(found), len(found), f"{found[0].dtype}, {found[0].mode}")

    rows = sweeper.sweep(device, keep, command=f"{COMMAND}sweep", **sizes)
    print("\n".join(sweeper.format_lines(rows)), flush=True)
    timed = [row for row in rows if row.median_us]
    bad = [row for row in rows if row.reason not in ("", sweeper.NOT_TIMED, sweeper.NOT_REACHED)]
    report(figure=f"{len(timed)} timed, {len(bad)} wrong or not launched, of {len(rows)}")
    return FAILED if bad or not rows else PASSED


def tune(out: Path, device: str = "cuda", models: Sequence[str] = TUNED, scope: tuner.Scope | None = None) -> str:
    """What is fastest on this GPU, as a table that can ship with the package. It grows and is written batch by batch
    and model by model, the largest batch first."""
    scope = scope or tuner.scope_of(torch.device(device), quick=True)
    table: Table | None = None
    for batch, model in itertools.product(sorted(scope.batches, reverse=True), models):
        found = tuner.tune(device, [model], scope=replace(scope, batches=(batch,)), progress=progress)
        table = found if table is None else table.merged(found)
        table.save(out / "tuning.json")
        choices = [choice for measured in table.choices.values() for choice in measured.values()]
        counts = Counter(choice.backend for choice in choices)
        excluded = sum(len(choice.excluded) for choice in choices)
        words = f"{len(choices)} choices: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())
        report(figure=words + (f"; {excluded} candidates excluded" if excluded else ""))
    return PASSED


def profiles(
    out: Path, device: str = "cuda", setups: Iterable[Setup] | None = None, top: int = 12, **overrides: Any
) -> str:
    """Time per kernel of training steps. Each profile is printed and written when it is there; one that fails does not
    keep the others from running, and one that was to be compiled, in a run that does without, is skipped."""
    words: list[str] = []
    failed = 0
    for setup in setups_of(backends_of(device)) if setups is None else setups:
        print(f"{setup} ...", flush=True)
        try:
            found = profile(setup, device, **overrides)
            append(out / "profile.jsonl", found.to_json_lines())
            print_table(functools.partial(profile_table, found, top))
            group, (_, share, _) = next(iter(found.groups().items()))
            how = f" {COMPILED}" if setup.compiled else ""
            words.append(f"{setup.model} {setup.provider}{how}: {group} {share:.0%}")
        except NotCompiled as error:
            print(f"{setup}: skipped: {error}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{setup}: {type(error).__name__}: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        report(figure="; ".join([*([f"{failed} failed"] if failed else []), *words]))
    return PASSED if words and not failed else FAILED


def setups_of(backends: Sequence[str]) -> Iterator[Setup]:
    """Ours by each backend, and timm's. Eager ones first: compiling a step takes half a minute."""
    eager, compiled = (*(f"{OUR_MODEL}:{backend}" for backend in backends), RIVAL), (OUR_MODEL, RIVAL)
    for providers, is_compiled in ((eager, False), (compiled, True)):
        for model, provider in itertools.product(PROFILED, providers):
            yield Setup(model, BATCH, provider, compiled=is_compiled)
