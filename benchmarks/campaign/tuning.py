"""Stage tune: what is fastest on this GPU, as a table that can ship with the package."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastvit.benchmarks.campaign.output import PASSED, progress, report
from fastvit.tuning import Table

MODELS = ("S", "B")


def tune(out: Path, device: str = "cuda", models: Sequence[str] = MODELS) -> str:
    """The table grows and is written batch by batch and model by model, the largest batch first."""
    from fastvit.benchmarks.tune import scope_of
    from fastvit.benchmarks.tune import tune as measure

    scope = scope_of(torch.device(device), quick=True)
    table: Table | None = None
    for batch, model in itertools.product(sorted(scope.batches, reverse=True), models):
        found = measure(device, [model], scope=replace(scope, batches=(batch,)), progress=progress)
        table = found if table is None else table.merged(found)
        table.save(out / "tuning.json")
        report(figure=summary(table))
    return PASSED


def summary(table: Table) -> str:
    """How many choices, and how many for each backend."""
    choices = [choice for measured in table.choices.values() for choice in measured.values()]
    counts = Counter(choice.backend for choice in choices)
    words = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    excluded = sum(len(choice.excluded) for choice in choices)
    return f"{len(choices)} choices: {words}" + (f"; {excluded} candidates excluded" if excluded else "")
