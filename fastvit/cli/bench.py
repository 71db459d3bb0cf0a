"""`fastvit bench`."""

from __future__ import annotations

from pathlib import Path

import typer

from .common import check_choices, console, fail, progress_bar
from .validate import check_device

SIZES = ("tiny", "small", "full")


def bench(
    suites: list[str] | None = typer.Argument(None, help="patch_embed, add_position, model. Default: all."),
    size: str = typer.Option("small", help="small: minutes; full: every shape; tiny: only shows that all runs."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N. Default: a GPU where there is one."),
    threads: int | None = typer.Option(None, help="Threads on a CPU. Default: as torch chooses.", min=1),
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON for each row."),
    output: Path | None = typer.Option(None, help="Also write the rows to this file, as JSON lines."),
) -> None:
    """Measure beside the rivals in one process; the table has the ratio to each rival first, losses in red.

    A ratio is the rival's median over ours: above 1, we are faster. A case is timed only after it was checked in
    this process. Our rows are called fastvit:<backend>.

    Examples:

      fastvit bench patch_embed

      fastvit bench --size full --json > rows.jsonl
    """
    from fastvit.benchmarks.runner import SUITES, format_table, run_suites, write_json_lines

    names = list(suites or SUITES)
    check_choices("suite", names, list(SUITES))
    check_choices("--size", [size], SIZES)
    check_device(device)
    with progress_bar() as progress:
        rows = run_suites(names, size, device, progress, threads=threads)
    if as_json:
        for row in rows:
            print(row.to_json())
    else:
        console().print(format_table(rows))
    if output is not None:
        write_json_lines(rows, output)
    ours = [row for row in rows if row.provider.startswith("fastvit:")]
    if not any(row.median_us is not None for row in ours):
        fail("none of our rows could be measured: see the reasons in the table", 1)
