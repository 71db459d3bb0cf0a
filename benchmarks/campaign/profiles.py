"""Stage profile: time per kernel of training steps, so that data says what to optimise next."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastvit.benchmarks.campaign.output import Lines, passed_if, print_table, report
from fastvit.benchmarks.profiling import OURS, Setup, format_table, profile

BATCH = 256
# Eager ones first: compiling a step takes half a minute.
SETUPS = tuple(
    Setup(model, BATCH, provider, compiled=compiled)
    for compiled, model, provider in itertools.product((False, True), ("S", "B"), (OURS, "timm"))
)


def profiles(out: Path, device: str = "cuda", setups: Iterable[Setup] = SETUPS, top: int = 12, **overrides: Any) -> str:
    """Each profile is printed and written when it is there; one that fails does not keep the others from running."""
    lines = Lines(out / "profile.jsonl")
    words: list[str] = []
    failed = 0
    for setup in setups:
        print(f"{setup} ...", flush=True)
        try:
            found = profile(setup, device, **overrides)
        except Exception as error:
            failed += 1
            print(f"{setup}: {type(error).__name__}: {error}", flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        lines.write(found.to_json_lines())
        print_table(functools.partial(format_table, found, top))
        group, (_, share, _) = next(iter(found.groups().items()))
        how = " compiled" if setup.compiled else ""
        words.append(f"{setup.model} {setup.provider}{how}: {group} {share:.0%}")
        report(figure="; ".join(words))
    if failed:
        report(figure="; ".join([f"{failed} failed", *words]))
    return passed_if(failed == 0 and bool(words))
