"""The demo from start to end: look, check, train, compare, measure, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import collect, tables

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fastvit.training import TrainResult

    from .checks import Checks
    from .training import Comparison

REQUIRED_ACCURACY = 0.96


def run_demo(out: Path, *, quick: bool, console: Console) -> bool:
    """Run everything and write the report to `out`; whether validation, training and the comparison succeeded."""
    from .checks import run_checks
    from .measuring import run_benchmarks
    from .training import compare_with_timm, train_seeds

    out.mkdir(parents=True, exist_ok=True)
    environment = collect()
    _print_environment(console, environment)

    console.rule("1  Every backend against float64")
    with _bar(console, "checking") as progress:
        checks = run_checks(quick=quick, progress=progress)
    _print_checks(console, checks)

    console.rule("2  Training on handwritten digits")
    started = time.perf_counter()
    runs = train_seeds(out / "train", quick=quick, observers=_observers(console))
    train = _train_results(runs, time.perf_counter() - started, judged=not quick)
    _print_training(console, train)

    console.rule("3  The first losses beside timm's")
    comparison = compare_with_timm()
    _print_comparison(console, comparison)

    console.rule("4  Speed, side by side")
    with _bar(console, "measuring") as progress:
        bench = run_benchmarks(quick=quick, progress=progress)
    _print_benchmark(console, bench)

    results = {
        "quick": quick,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "fastvit demo --quick" if quick else "fastvit demo",
        "environment": {**environment, "device": _device_name(runs[0], environment)},
        "train": train,
        "validate": _check_results(checks),
        "timm": {**comparison.to_dict(), "ok": comparison.ok},
        "bench": bench,
    }
    _write(out, results, runs[0], {f"seed {run_index}": run.history for run_index, run in enumerate(runs)})
    return _verdict(console, out, results)


def _write(out: Path, results: dict[str, Any], run: TrainResult, histories: dict[str, Any]) -> None:
    from . import figures
    from .report import write_report

    model = run.model.eval()
    device = next(model.parameters()).device
    images, labels = _one_of_each_class(run)
    images = images.to(device)
    grid: Any = model.patch_embed.grid_size  # type: ignore[union-attr]
    positions: Any = model.pos_embed
    patch_positions = positions[0, -grid[0] * grid[1] :]
    results["train"]["position_similarity"] = figures.mean_similarity(patch_positions, tuple(grid))
    names = [run.data.classes[label] for label in labels.tolist()]
    pictures = {
        "curves": figures.draw_curves(out / "curves.png", histories, REQUIRED_ACCURACY),
        "positions": figures.draw_positions(out / "positions.png", patch_positions, tuple(grid)),
        "attention": figures.draw_attention(out / "attention.png", model, images, names, run.data.classes),
    }
    if results["timm"]["ours"]:
        ours, theirs = results["timm"]["ours"], results["timm"]["theirs"]
        pictures["first_losses"] = figures.draw_first_losses(out / "first_losses.png", ours, theirs)
    if any(row["ratios"] for row in results["bench"]):
        pictures["benchmark"] = figures.draw_benchmark(out / "benchmark.png", results["bench"])
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(out / "report.html", results, pictures)


def _one_of_each_class(run: TrainResult) -> tuple[Tensor, Tensor]:
    """The first test image of each class."""
    images, labels = run.data.test.load(list(range(len(run.data.test))))
    first = [int((labels == label).nonzero()[0]) for label in range(len(run.data.classes))]
    return images[first], labels[first]


def _train_results(runs: list[TrainResult], seconds: float, *, judged: bool) -> dict[str, Any]:
    import torch

    first = torch.load(runs[0].output / "last.pt", map_location="cpu", weights_only=True)
    mean = sum(run.test_accuracy for run in runs) / len(runs)
    return {
        "test_accuracy": mean,
        "required": REQUIRED_ACCURACY,
        "judged": judged,
        "ok": mean >= REQUIRED_ACCURACY or not judged,
        "seconds": seconds,
        "model": first["options"]["model"],
        "epochs": first["options"]["epochs"],
        "options": first["options"],
        "parameters": sum(p.numel() for p in runs[0].model.parameters()),
        "train_images": len(runs[0].data.train),
        "test_images": len(runs[0].data.test),
        "seeds": [
            {"seed": seed, "seconds": run.seconds, **run.history[-1], "history": run.history}
            for seed, run in enumerate(runs)
        ],
    }


def _check_results(checks: Checks) -> dict[str, Any]:
    return {
        **checks.counts,
        "ok": checks.ok,
        "problems": checks.problems,
        "cases": sorted({row["case"] for row in checks.rows if row["status"] != "skipped"}),
        "summary": checks.summary(),
        "failures": checks.failures,
        "not_run": checks.not_run(),
    }


def _device_name(run: TrainResult, environment: dict[str, Any]) -> str:
    device = next(run.model.parameters()).device
    if device.type == "cuda":
        return str(environment["gpus"][device.index or 0]["name"])
    return f"one core of {environment['system']['processor']}"


def _observers(console: Console) -> list[Any]:
    from fastvit.training.observers import ProgressBar

    return [ProgressBar(console, title="training", lines=False)]


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Callable[[int, int, str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def _print_environment(console: Console, environment: dict[str, Any]) -> None:
    console.rule("0  What is here")
    for table in tables(environment):
        console.print(table)
    for warning in environment["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def _print_checks(console: Console, checks: Checks) -> None:
    from rich.table import Table

    table = Table("backend", "on", "op", "compute", title="Error against the float64 reference", title_justify="left")
    for name in ("cases", "photographs", "passed", "failed", "of bound"):
        table.add_column(name, justify="right")
    for line in checks.summary():
        values = [
            line[name] for name in ("backend", "device", "op", "dtype", "cases", "photo_cases", "passed", "failed")
        ]
        table.add_row(*map(str, values), f"{line['strain']:.0%}", style="red" if line["failed"] else None)
    console.print(table)
    for name, reason in checks.not_run().items():
        console.print(f"{name}: not checked, {reason}", highlight=False)
    for row in checks.failures[:10]:
        reason = row["reason"] or f"error {row['error']} over its bound {row['bound']}"
        console.print(f"failed: {row['backend']} {row['op']} {row['case']} {row['quantity']}: {reason}", style="red")
    for problem in checks.problems:
        console.print(problem, style="red")
    counts = checks.counts
    console.print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", highlight=False)


def _print_training(console: Console, train: dict[str, Any]) -> None:
    for seed in train["seeds"]:
        console.print(
            f"seed {seed['seed']}: test accuracy {seed['test_accuracy']:.2%} after {train['epochs']} epochs, "
            f"{seed['seconds']:.0f} s",
            highlight=False,
        )
    needed = f"required: {train['required']:.0%}" if train["judged"] else "not judged in a quick run"
    console.print(f"mean test accuracy {train['test_accuracy']:.2%} ({needed})", highlight=False)


def _print_comparison(console: Console, comparison: Comparison) -> None:
    if comparison.skipped:
        console.print(f"skipped: {comparison.skipped}", highlight=False)
        return
    console.print(
        f"{len(comparison.ours)} losses from the same weights: largest difference "
        f"{comparison.largest_difference:.1e} (accepted: {comparison.to_dict()['tolerance']:.0e}); "
        f"first {comparison.ours[0]:.6f} and {comparison.theirs[0]:.6f}, "
        f"last {comparison.ours[-1]:.6f} and {comparison.theirs[-1]:.6f}",
        highlight=False,
    )


def _print_benchmark(console: Console, bench: list[dict[str, Any]]) -> None:
    from fastvit.benchmarks.runner import format_table

    from .measuring import as_rows

    console.print(format_table(as_rows(bench)))


def _verdict(console: Console, out: Path, results: dict[str, Any]) -> bool:
    """Print what went wrong, if anything, and where to look."""
    train, checks, timm = results["train"], results["validate"], results["timm"]
    wrong = []
    if not checks["ok"]:
        wrong.append(f"validation failed ({checks['failed']} of {checks['passed'] + checks['failed']} checks)")
    if not train["ok"]:
        wrong.append(f"test accuracy {train['test_accuracy']:.2%} is below {REQUIRED_ACCURACY:.0%}")
    if not timm["ok"]:
        wrong.append(f"losses differ from timm's by {timm['largest_difference']:.1e}")
    console.rule()
    for line in wrong:
        console.print(line, style="red", highlight=False)
    verdict = "FAILED" if wrong else "All good"
    console.print(
        f"{verdict}. Open {out / 'report.html'} (numbers: {out / 'results.json'})", soft_wrap=True, highlight=False
    )
    return not wrong
