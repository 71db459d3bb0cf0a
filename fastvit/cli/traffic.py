"""`fastvit bench traffic`: what is counted, not timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import check_choices, console, fail, progress_bar, split_commas

SUITE = "traffic"


def count_traffic(
    chosen: dict[str, list[str] | None],
    batch: int | None,
    limits: Sequence[float | None],
    output: Path | None,
    as_json: bool,
) -> None:
    """Count, print and write.

    Args:
        chosen: by the options' names, which hosts, models, settings, streams and ways; None: all (of models: S).
        limits: TB/s and TFLOP/s of the GPU that floors are of.
    """
    from fastvit.benchmarks.rows import write_json_lines
    from fastvit.benchmarks.traffic import suite

    known: dict[str, Sequence[str]] = {
        "--host": tuple(suite.HOSTS),
        "--model": tuple(suite.DEPTHS),
        "--setting": suite.SETTINGS,
        "--stream": suite.STREAMS,
        "--way": suite.WAYS,
    }
    wanted: dict[str, Any] = {}
    for option, values in chosen.items():
        names = split_commas(values)
        check_choices(option, names, known[option])
        if names:
            wanted[option.removeprefix("--") + "s"] = names
    with progress_bar() as progress:
        rows = suite.run(suite.cases(**wanted, batch=batch or 256), progress)
    if as_json:
        for row in rows:
            print(row.to_json())
    else:
        bandwidth, rate = limits
        per_us = (1e6 * (bandwidth or suite.TB_PER_S), 1e6 * (rate or suite.TFLOP_PER_S))
        console().print(suite.format_table(rows, *per_us, suite.GPU if (bandwidth, rate) == (None, None) else "a GPU"))
    if output is not None:
        write_json_lines(rows, output)
    if all(row.reason for row in rows):
        fail("nothing could be counted: see the reasons", 1)
