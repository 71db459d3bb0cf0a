"""Stage profile: time per kernel of training steps, so that data says what to optimise next."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.benchmarks.campaign.backends import backends_of
from fastvit.benchmarks.campaign.output import Lines, passed_if, print_table, report
from fastvit.benchmarks.problem import NotCompiled
from fastvit.benchmarks.profiling import OURS, Setup, format_table, profile

BATCH, MODELS, RIVAL = 256, ("S", "B"), "timm"


def plan(backends: Sequence[str]) -> list[Setup]:
    """Ours by each backend, and timm's. Eager ones first: compiling a step takes half a minute."""
    providers = [*(f"{OURS}:{backend}" for backend in backends), RIVAL]
    eager = [Setup(model, BATCH, provider) for model, provider in itertools.product(MODELS, providers)]
    compiled = itertools.product(MODELS, (OURS, RIVAL))
    return [*eager, *(Setup(model, BATCH, provider, compiled=True) for model, provider in compiled)]


def profiles(
    out: Path, device: str = "cuda", setups: Iterable[Setup] | None = None, top: int = 12, **overrides: Any
) -> str:
    """Each profile is printed and written when it is there; one that fails does not keep the others from running, and
    one that was to be compiled, in a run that does without, is skipped."""
    lines = Lines(out / "profile.jsonl")
    words: list[str] = []
    failed = 0
    for setup in plan(backends_of(device)) if setups is None else setups:
        print(f"{setup} ...", flush=True)
        try:
            found = profile(setup, device, **overrides)
        except NotCompiled as error:
            print(f"{setup}: skipped: {error}", flush=True)
            continue
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
