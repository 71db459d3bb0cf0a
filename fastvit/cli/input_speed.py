"""`fastvit bench input --data`: which waits in a training, the loader or the step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .common import console, fail, given, progress_bar, split_commas

if TYPE_CHECKING:
    from rich.table import Table

    from fastvit.training.input_speed import InputSpeed

SUITE = "input"


def measure_input(options: dict[str, Any], as_json: bool) -> None:
    """Measure and print. `options`: by their names on the command line, those of `fastvit train` among them."""
    from fastvit.training import TrainOptions
    from fastvit.training.input_speed import measure, prepared, verdict

    values = given({option.removeprefix("--").replace("-", "_"): value for option, value in options.items()})
    models = split_commas(values.pop("model", None))
    if len(models) > 1:
        fail(f"--model {','.join(models)}: accepted is one model, with --data")
    if models:
        values["model"] = models[0]
    if {"seconds", "steps"} <= values.keys():
        fail("--seconds: not accepted together with --steps")
    budget = {name: values.pop(name) for name in ("seconds", "steps") if name in values}
    with prepared(TrainOptions(**values)) as run, progress_bar() as progress:
        found = measure(run, **budget, progress=progress)
    if as_json:
        print(json.dumps({**found.to_dict(), "verdict": verdict(found)}))
    else:
        console().print(table_of(found))
        console().print(verdict(found), highlight=False)


def table_of(found: InputSpeed) -> Table:
    from rich.table import Table

    title = (
        f"{found.data}: {found.images:,} images, workers {found.workers}, {found.device}; times of {found.steps} steps"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("images/s", "least", "most"):
        table.add_column(heading, justify="right")
    for name, rate in (("loader", found.loader), ("training step", found.step), ("both", found.both)):
        table.add_row(name, *(f"{value:,.0f}" for value in (rate.median, rate.least, rate.most)))
    return table
