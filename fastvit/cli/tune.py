"""`fastvit tune`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .common import DEVICE, THREADS, check_choices, console, fail, progress_bar, split_commas

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fastvit.tuning import Table

MODELS = ("Ti", "S", "B", "L")


def tune(
    quick: bool = typer.Option(False, "--quick", help="Fewer batch sizes and precisions."),
    device: str | None = DEVICE,
    model: list[str] | None = typer.Option(
        None, help="A model size: Ti, S, B, L. Repeat or separate by commas. Default: S and B."
    ),
    threads: int | None = THREADS,
    output: Path | None = typer.Option(None, help="File for the table. Default: where it is looked for at run time."),
    as_json: bool = typer.Option(False, "--json", help="Print the measurements as JSON."),
    show: bool = typer.Option(False, "--show", help="Print the tables in force here, and measure nothing."),
) -> None:
    """Measure which path is fastest for the shapes of a model on this machine, and keep the winners in a file.

    Candidates are every backend that runs here, each configuration of the Triton kernels, and PyTorch's own path,
    which nothing that is chosen may be slower than. Each is checked before it is timed. Processes that start from
    then on and force no backend follow the file. FASTVIT_TUNING names another file; FASTVIT_TUNING=off uses none.

    Examples:

      fastvit tune --quick

      fastvit tune --model S,L --device cuda:0

      fastvit tune --show
    """
    models = split_commas(model) or ["S", "B"]
    check_choices("--model", models, MODELS)
    from fastvit.training.distributed import choose_device

    where = choose_device(device or "auto")
    if show:
        _show([where] if device or where.type == "cpu" else [where, choose_device("cpu")], as_json)
        return
    from fastvit import tuning
    from fastvit.benchmarks.problem import steady
    from fastvit.benchmarks.tune import tune as run

    with steady(where, threads):  # a file is that of a number of threads
        path = output or tuning.default_path(where)
        _check_writable(path)
        with progress_bar() as progress:
            measured = run(where, models, quick, progress, threads)
        _earlier(path, where).merged(measured).save(path)
    out = console()
    if as_json:
        print(measured.to_json(), end="")
        out = console(to_stderr=True)
    else:
        _print(measured, out)
    out.print(f"Wrote {path}: tuning table of {measured.device}", highlight=False, soft_wrap=True)
    if tuning.is_off():
        out.print(f"FASTVIT_TUNING={os.environ['FASTVIT_TUNING']}: no table is used", style="yellow")


def _check_writable(path: Path) -> None:
    """Refuse a file that can't be written, before minutes are spent on what goes into it."""
    reason = "it is a folder" if path.is_dir() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        fail(f"--output {path}: accepted is a file that can be written ({reason})")


def _earlier(path: Path, device: torch.device) -> Table:
    """The measurements that a new table leaves as they are: those of the same device and versions."""
    from fastvit.tuning import Table, current_versions, device_name

    try:
        table = Table.load(path)
    except (OSError, ValueError):
        table = None
    if table is None or table.mismatch(device):
        return Table(device_name(device), current_versions())
    return table


def _show(devices: list[torch.device], as_json: bool) -> None:
    from fastvit import tuning

    tables = {device: tuning.source(device).table for device in devices}
    if as_json:
        print(json.dumps({str(d): json.loads(t.to_json()) if t else None for d, t in tables.items()}, indent=2))
        return
    out = console()
    for device, table in tables.items():
        if table is not None:
            _print(table, out)
        out.print(f"{device}: {tuning.describe(device)}", highlight=False, soft_wrap=True)


def _print(table: Table, out: Console) -> None:
    """A line for each measurement: what was chosen, its time, PyTorch's, and how many times faster it is."""
    from rich.table import Table as Grid

    from fastvit.benchmarks.rows import time_text

    grid = Grid(title=f"Fastest on {table.device}", title_justify="left")
    for heading in ("op", "mode", "images, compute, out", "shape", "rows", "choice"):
        grid.add_column(heading)
    for heading in ("time", "PyTorch", "ratio"):
        grid.add_column(heading, justify="right")
    reasons = []
    for problem, measured in table.choices.items():
        dtypes = ", ".join(str(t).removeprefix("torch.") for t in (problem.image, problem.compute, problem.out))
        shape = "x".join(map(str, problem.shape)) + (", keep" if problem.keep else "")
        for rows, choice in sorted(measured.items()):
            grid.add_row(
                problem.op,
                problem.mode,
                dtypes,
                shape,
                str(rows),
                choice.name,
                time_text(choice.time_us),
                time_text(choice.reference_us),
                f"{choice.reference_us / choice.time_us:.2f}x",
            )
            case = f"{problem.op} {problem.mode}, {shape}, {rows} rows"
            reasons += [f"{case}, {candidate}: {reason}" for candidate, reason in choice.excluded.items()]
    out.print(grid)
    for reason in reasons:
        out.print(reason, highlight=False, markup=False)
