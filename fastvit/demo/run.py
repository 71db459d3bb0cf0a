"""The demo from start to end: look, check, train, compare, measure, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fastvit.benchmarks import patch_embed
from fastvit.benchmarks.rows import Row, format_table, processor
from fastvit.benchmarks.runner import SECONDS as SUITE_SECONDS
from fastvit.benchmarks.runner import SUITES, run_plan
from fastvit.training import Run
from fastvit.training.observers import ProgressBar

from . import figures
from .checks import Checks, run_checks
from .environment import collect, tables
from .report import seeds_table, write_report
from .training import LOSS_TOLERANCE, Comparison, compare_with_timm, train_seeds

REQUIRED_ACCURACY = 0.96
# Enough for medians that repeat within a few percent on a quiet machine; `fastvit bench` takes longer.
SECONDS = 1.0


def run_demo(out: Path, *, quick: bool, console: Console) -> bool:
    """Run everything and write the report to `out`; whether validation, training and the comparison succeeded."""
    out.mkdir(parents=True, exist_ok=True)
    console.rule("0  What is here")
    environment = collect()
    console.print(*tables(environment))
    for warning in environment["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)

    console.rule("1  Every backend against float64")
    with _bar(console, "checking") as progress:
        checks = run_checks(quick=quick, progress=progress)
    console.print(checks.table(), *checks.problems)

    console.rule("2  Training on handwritten digits")
    started = time.perf_counter()
    runs = train_seeds(out / "train", quick=quick, observers=[ProgressBar(console, lines=False)])
    train = train_results(runs, time.perf_counter() - started, judged=not quick)
    console.print(seeds_table(train))

    console.rule("3  The first losses beside timm's")
    comparison = compare_with_timm()
    console.print(_compared(comparison), highlight=False)

    console.rule("4  Speed, side by side")
    with _bar(console, "measuring") as progress:
        rows = run_benchmarks(quick=quick, progress=progress)
    console.print(format_table(rows))

    results = {
        "quick": quick,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "fastvit demo --quick" if quick else "fastvit demo",
        "environment": {**environment, "device": _device(runs[0].team.device)},
        "train": train,
        "validate": checks.to_dict(),
        "timm": comparison.to_dict(),
        "bench": [asdict(row) for row in rows],
    }
    _write(out, results, runs, checks, rows)
    return _verdict(console, out, results)


def run_benchmarks(*, quick: bool, progress: Callable[[int, int, str], None]) -> list[Row]:
    """Rows of a few cases, each of ours with its ratios to the rivals."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if quick:
        return run_plan(SUITES["patch_embed"]("tiny", device), device, SUITE_SECONDS["tiny"], progress)
    # One model width is enough here, and rivals as they are, for compiling them takes longer than all else.
    shape = patch_embed.Shape("S", 256 if on_gpu else 16)
    plan = [
        (f"{shape}, {precision}", partial(patch_embed.problems_of, shape, precision, device))
        for precision in (patch_embed.ON_GPU if on_gpu else patch_embed.ON_CPU)
    ]
    return run_plan(plan + SUITES["model"]("small", device)[:1], device, SECONDS, progress)


def _write(out: Path, results: dict[str, Any], runs: list[Run], checks: Checks, rows: list[Row]) -> None:
    """The pictures, results.json and the page."""
    run = runs[0]
    data, model = run.data, run.model.eval()
    grid: Any = tuple(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    positions: Any = model.pos_embed
    positions = positions[0, -grid[0] * grid[1] :]
    results["train"]["position_similarity"] = figures.mean_similarity(positions, grid)
    labels = data.test.labels.tolist()
    images, _ = data.test[[labels.index(label) for label in range(len(data.classes))]]  # the first of each class
    images = images.to(run.team.device)
    histories: dict[str, Any] = {f"seed {seed}": run.history for seed, run in enumerate(runs)}
    pictures = {
        "curves": figures.draw_curves(out / "curves.png", histories, REQUIRED_ACCURACY),
        "positions": figures.draw_positions(out / "positions.png", positions, grid),
        "attention": figures.draw_attention(out / "attention.png", model, images, data.classes),
    }
    compared = results["timm"]
    if compared["ours"]:
        path = out / "first_losses.png"
        pictures["first_losses"] = figures.draw_first_losses(path, compared["ours"], compared["theirs"])
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(out / "report.html", results, checks, rows, pictures)


def train_results(runs: list[Run], seconds: float, *, judged: bool) -> dict[str, Any]:
    """What came out of the seeds; below the required accuracy it is not ok, where it is `judged`."""
    mean = sum(run.test_accuracy for run in runs) / len(runs)
    options = asdict(runs[0].options)
    return {
        "test_accuracy": mean,
        "required": REQUIRED_ACCURACY,
        "judged": judged,
        "ok": mean >= REQUIRED_ACCURACY or not judged,
        "seconds": seconds,
        "model": options["model"],
        "epochs": options["epochs"],
        "options": options,
        "parameters": sum(p.numel() for p in runs[0].model.parameters()),
        "train_images": len(runs[0].data.train),
        "test_images": len(runs[0].data.test),
        "seeds": [
            {"seed": run.options.seed, "seconds": run.seconds, **run.history[-1], "history": run.history}
            for run in runs
        ],
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"one core of {processor()}"


def _compared(found: Comparison) -> str:
    if found.skipped:
        return f"skipped: {found.skipped}"
    return (
        f"{len(found.ours)} losses from the same weights, from {found.ours[0]:.6f} and {found.theirs[0]:.6f} to "
        f"{found.ours[-1]:.6f} and {found.theirs[-1]:.6f}: largest difference {found.largest_difference:.1e} "
        f"(accepted: {LOSS_TOLERANCE:.0e})"
    )


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Callable[[int, int, str], None]]:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=f"{title} {text}")


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
