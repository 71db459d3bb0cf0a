"""`fastvit bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from .common import DEVICE, THREADS, check_choices, console, fail, progress_bar
from .input_speed import SUITE as INPUT
from .input_speed import measure_input
from .traffic import SUITE as TRAFFIC
from .traffic import count_traffic
from .validate import check_device

if TYPE_CHECKING:
    from fastvit.benchmarks.rows import Row

SIZES = ("tiny", "small", "full")
OF_TRAFFIC = "Options of the suite traffic"
OF_INPUT = "Options of the suite input with --data"


def bench(
    suites: list[str] | None = typer.Argument(
        None, help="Suites, such as patch_embed, masked or model. Default: all that are timed. traffic: counted."
    ),
    size: str | None = typer.Option(
        None, help="small (the default): minutes; full: every shape; tiny: only shows that all runs."
    ),
    device: str | None = DEVICE,
    threads: int | None = THREADS,
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON for each row."),
    output: Path | None = typer.Option(None, help="Also write the rows to this file, as JSON lines."),
    report: Path | None = typer.Option(None, help="Also write report.html with pictures into this folder."),
    recorded: list[Path] | None = typer.Option(
        None, "--rows", help="Measure nothing: report the rows of this file (may be repeated)."
    ),
    compare: tuple[Path, Path] | None = typer.Option(
        None, help="Measure nothing: compare two files of rows, before and after.", metavar="BEFORE AFTER"
    ),
    host: list[str] | None = typer.Option(
        None,
        help="timm, torchvision, transformers vit, transformers dinov2, fastvit. Default: all. "
        "This and the next four: repeat or separate by commas.",
        rich_help_panel=OF_TRAFFIC,
    ),
    model: list[str] | None = typer.Option(
        None, help="Ti, S, B, L. Default: S. With --data: as in `fastvit train`.", rich_help_panel=OF_TRAFFIC
    ),
    setting: list[str] | None = typer.Option(
        None, help="plain, layerscale+droppath. Default: both.", rich_help_panel=OF_TRAFFIC
    ),
    stream: list[str] | None = typer.Option(
        None, help="The residual stream: float32, bfloat16. Default: both.", rich_help_panel=OF_TRAFFIC
    ),
    way: list[str] | None = typer.Option(
        None,
        help="eager, compiled, accelerated, accelerated compiled. Default: all. To compile takes most of a minute.",
        rich_help_panel=OF_TRAFFIC,
    ),
    batch: int | None = typer.Option(None, help="Images. Default: 256.", min=1, rich_help_panel=OF_TRAFFIC),
    bandwidth: float | None = typer.Option(
        None, help="TB/s of the GPU that floors are of. Default: H200's 4.8.", min=0.001, rich_help_panel=OF_TRAFFIC
    ),
    rate: float | None = typer.Option(
        None, help="Its TFLOP/s in bfloat16. Default: H200's 989.5.", min=0.001, rich_help_panel=OF_TRAFFIC
    ),
    data: str | None = typer.Option(
        None, help="'digits' or a folder. This, --model and the next: as in `fastvit train`.", rich_help_panel=OF_INPUT
    ),
    image_size: int | None = typer.Option(None, help="Height and width.", rich_help_panel=OF_INPUT),
    batch_size: int | None = typer.Option(None, help="Images a step.", rich_help_panel=OF_INPUT),
    tokens_per_batch: int | None = typer.Option(None, help="Instead of --batch-size.", rich_help_panel=OF_INPUT),
    max_tokens: int | None = typer.Option(None, help="With --tokens-per-batch.", rich_help_panel=OF_INPUT),
    workers: int | None = typer.Option(None, help="Processes that decode images.", rich_help_panel=OF_INPUT),
    amp: str | None = typer.Option(None, help="Mixed precision: off, bf16, fp16.", rich_help_panel=OF_INPUT),
    compile: bool | None = typer.Option(None, "--compile", help="Use torch.compile.", rich_help_panel=OF_INPUT),
    seconds: float | None = typer.Option(
        None, help="To spend in all, about. Default: 20.", min=0.001, rich_help_panel=OF_INPUT
    ),
    steps: int | None = typer.Option(
        None, help="Instead of --seconds: in each of the times that are taken.", min=1, rich_help_panel=OF_INPUT
    ),
) -> None:
    """Measure beside the rivals in one process; the table has the ratio to each rival first, losses in red.

    A ratio is the rival's median over ours: above 1, we are faster. A case is timed only after it was checked in
    this process. Our rows are called fastvit:<backend>.

    With --compare, the exit code is 1 if a row of ours became slower or no longer runs.

    The suite traffic times nothing and needs no GPU: it counts the bytes that a training step reads and writes on one,
    and its launches, eager and compiled, accelerated and not.

    The suite input with --data measures the input of a training instead: images a second of the loader alone, of the
    training step alone, and of both together; and it says which of the two waits, and what would help.

    Examples:

      fastvit bench patch_embed

      fastvit bench --size full --report out/bench

      fastvit bench --rows out/bench/rows.jsonl --report out/page

      fastvit bench --compare before.jsonl after.jsonl

      fastvit bench traffic --host timm --way eager,compiled

      fastvit bench input --data photos/ --model vit_small_patch16_224 --amp bf16 --workers 8
    """
    of_traffic = {"--host": host, "--model": model, "--setting": setting, "--stream": stream, "--way": way}
    limits = {"--batch": batch, "--bandwidth": bandwidth, "--rate": rate}
    of_training: dict[str, Any] = {"--data": data, "--image-size": image_size, "--batch-size": batch_size}
    of_training |= {"--tokens-per-batch": tokens_per_batch, "--max-tokens": max_tokens, "--workers": workers}
    of_training |= {"--amp": amp, "--compile": compile, "--seconds": seconds, "--steps": steps}
    timing = {"--size": size, "--device": device, "--threads": threads, "--report": report, "--rows": recorded}
    if TRAFFIC in (suites or ()):
        _refuse(TRAFFIC, {**timing, **of_training, "--compare": compare}, "nothing is timed")
        if suites != [TRAFFIC]:
            fail(f"{TRAFFIC}: not accepted together with other suites, since it is not timed")
        count_traffic(of_traffic, batch, (bandwidth, rate), output, as_json)
        return
    if data is not None:
        if suites != [INPUT]:
            fail(f"--data: accepted only with the suite {INPUT} alone")
        others = {**limits, **of_traffic, "--model": None, "--size": size, "--report": report, "--rows": recorded}
        _refuse("--data", {**others, "--compare": compare, "--output": output}, "a training is measured")
        measure_input({**of_training, "--model": model, "--device": device, "--threads": threads}, as_json)
        return
    for option in _written(of_training):
        fail(f"{option}: accepted only with the suite {INPUT} and --data")
    for option in _written({**of_traffic, **limits}):
        fail(f"{option}: accepted only with the suite {TRAFFIC}")
    measuring = {"SUITES": suites, "--size": size, "--device": device, "--threads": threads, "--output": output}
    if compare is not None:
        _refuse("--compare", {**measuring, "--report": report, "--rows": recorded})
        _compare(*compare, as_json=as_json)
        return
    if recorded:
        _refuse("--rows", measuring)
        if report is None:
            fail("--rows: accepted only together with --report FOLDER")
    if report is not None and report.exists() and not report.is_dir():
        fail(f"--report {report}: accepted is a folder, new or old")
    rows = _read(recorded) if recorded else _measure(suites, size or "small", device, threads)
    _print_rows(rows, as_json)
    _write(rows, output, report, sys.stderr if as_json else sys.stdout)
    if not any(row.is_ours and row.median_us is not None for row in rows):
        fail("none of our rows could be measured: see the reasons in the table", 1)


def _refuse(option: str, others: dict[str, Any], why: str = "nothing is measured") -> None:
    """An option with which nothing is measured goes with none of these."""
    written = _written(others)
    if written:
        fail(f"{option}: not accepted together with {', '.join(written)}, since {why}")


def _written(options: dict[str, Any]) -> list[str]:
    """Those that were on the command line."""
    return [name for name, value in options.items() if value not in (None, [])]


def _measure(suites: list[str] | None, size: str, device: str | None, threads: int | None) -> list[Row]:
    from fastvit.benchmarks.runner import SUITES, run_suites

    names = list(suites or SUITES)
    check_choices("suite", names, [*SUITES, TRAFFIC])
    check_choices("--size", [size], SIZES)
    check_device(device)
    with progress_bar() as progress:
        return run_suites(names, size, device, progress, threads=threads)


def _read(paths: Sequence[Path]) -> list[Row]:
    from fastvit.benchmarks.rows import read_json_lines

    rows: list[Row] = []
    for path in paths:
        try:
            found = read_json_lines(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a file of benchmark rows: {error}") from error
        if not found:
            raise ValueError(f"{path}: there are no benchmark rows in it")
        rows += found
    return rows


def _print_rows(rows: Sequence[Row], as_json: bool) -> None:
    from fastvit.benchmarks.rows import format_table

    if as_json:
        for row in rows:
            print(row.to_json())
    else:
        console().print(format_table(rows))


def _write(rows: Sequence[Row], output: Path | None, report: Path | None, said: TextIO) -> None:
    """Write what was asked for, and say where the page is."""
    from fastvit.benchmarks.rows import write_json_lines

    if output is not None:
        write_json_lines(rows, output)
    if report is not None:
        from fastvit.benchmarks.report import write_report

        page = write_report(rows, report)
        print(f"Open {page} (rows: {page.with_name('rows.jsonl')})", file=said)


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from fastvit.benchmarks.compare import compare, format_comparison

    found = compare(_read([before]), _read([after]))
    if as_json:
        for change in found.changes:
            print(change.to_json())
        for line in found.differences:
            print(f"differs: {line}", file=sys.stderr)
    else:
        console().print(format_comparison(found))
    if found.regressions:
        raise typer.Exit(1)
