"""report.html: one file that needs nothing beside it, from the demo's results and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fastvit.benchmarks.figures import grouped
from fastvit.benchmarks.report import ratio_section
from fastvit.benchmarks.rows import Row
from fastvit.pages import head, picture, section, table, write_page

from .checks import Checks
from .environment import tables

Pictures = Mapping[str, Path]


def write_report(path: Path, results: dict[str, Any], checks: Checks, rows: Sequence[Row], pictures: Pictures) -> None:
    """Write the page. `pictures` by name: curves, first_losses, positions, attention."""
    body = [
        _head(results),
        _training(results["train"], pictures),
        _timm(results["timm"], pictures),
        _inside(results["train"]["position_similarity"], pictures),
        validation(checks),
        _benchmark(path.parent, rows, results["quick"]),
        section("Environment", "".join(map(html_table, tables(results["environment"]))) + f"<p>{results['date']}</p>"),
        _reproduce(results["command"]),
    ]
    write_page(path, "FastViT demo", "\n".join(body))


def html_table(shown: Table) -> str:
    """A terminal's table as HTML."""
    columns = [[Text.from_markup(str(cell)).plain for cell in column.cells] for column in shown.columns]
    heads = [str(column.header) for column in shown.columns]
    numbers = [index for index, column in enumerate(shown.columns) if column.justify == "right"]
    return table(heads, zip(*columns, strict=True), numbers)


def seeds_table(train: dict[str, Any]) -> Table:
    """A line for each seed, and the mean of their accuracy with what is required of it."""
    needed = f"required: {train['required']:.0%}" if train["judged"] else "not judged in a quick run"
    shown = Table("seed", caption=f"mean test accuracy {train['test_accuracy']:.2%} ({needed})")
    for heading in ("test accuracy", "training loss", "test loss", "time"):
        shown.add_column(heading, justify="right")
    for seed in train["seeds"]:
        losses = [f"{seed[name]:.4f}" for name in ("train_loss", "test_loss")]
        shown.add_row(f"{seed['seed']}", f"{seed['test_accuracy']:.2%}", *losses, f"{seed['seconds']:.0f} s")
    return shown


def _head(results: dict[str, Any]) -> str:
    train, checks, gap = results["train"], results["validate"], results["timm"]
    facts = [
        (
            f"{train['test_accuracy']:.2%}",
            f"mean test accuracy on {train['test_images']} digits, {len(train['seeds'])} seeds",
            _kind(train["ok"], train["judged"]),
        ),
        (
            f"{checks['passed']:,} passed" + (f", {checks['failed']:,} failed" if checks["failed"] else ""),
            "checks against float64, forward and gradients",
            _kind(checks["ok"]),
        ),
        (
            "skipped" if gap["skipped"] else f"{gap['largest_difference']:.1e}",
            gap["skipped"] or f"largest difference to timm in {gap['steps']} losses",
            _kind(gap["ok"], not gap["skipped"]),
        ),
        (f"{train['seconds']:.0f} s", f"to train all seeds on {results['environment']['device']}", ""),
    ]
    return head(
        "FastViT demo",
        "From raw uint8 images to the token sequence of a Vision Transformer in one operation: checked, trained and "
        "measured on this machine.",
        facts,
        "A quick run: shortened training, whose accuracy is not judged." if results["quick"] else "",
    )


def _kind(ok: bool, judged: bool = True) -> str:
    return "" if not judged else "good" if ok else "bad"


def _training(train: dict[str, Any], pictures: Pictures) -> str:
    return section(
        "Training on real images",
        f"<p>{escape(train['model'])}: {train['parameters']:,} parameters, patch 2, one channel, "
        f"{train['epochs']} epochs on {train['train_images']:,} of scikit-learn's bundled handwritten "
        f"digits, 8×8 pixels; tested on the other {train['test_images']}, in a split that is the same "
        "for every seed. The accuracy is the last epoch's, "
        "not the best. The training loss has label smoothing in it, so it stays above the test loss.</p>"
        + picture(pictures["curves"], "Loss and test accuracy over the epochs")
        + html_table(seeds_table(train)),
    )


def _timm(found: dict[str, Any], pictures: Pictures) -> str:
    if found["skipped"]:
        return section("The same losses as timm", f"<p>Not compared: {escape(found['skipped'])}</p>")
    return section(
        "The same losses as timm",
        f"<p>timm's <code>VisionTransformer</code> and ours start from the same weights and see the same "
        f"batches with the same optimiser: ours takes the raw uint8 digits, timm's the normalised float ones. "
        f"Over the first {found['steps']} steps the losses differ by at most {found['largest_difference']:.1e} "
        f"(accepted: {found['tolerance']:.0e}; fp32 rounds at 1e-7, and training multiplies the differences).</p>"
        + picture(pictures["first_losses"], "The first losses of FastViT and timm, and their difference"),
    )


def _inside(near: dict[str, float], pictures: Pictures) -> str:
    return section(
        "What the model learned",
        "<p>Similarity of the learned positions, as in figure 7 of Dosovitskiy et al. (2021): each small map compares "
        "the position of one patch with all others. Nothing told the model that the patches form a grid, "
        "and so short a training moves the positions only a little from their random start. "
        f"Neighbours: {near['neighbours']:+.2f} on average; patches at least {near['far_steps']} steps apart: "
        f"{near['far']:+.2f}.</p>"
        + picture(pictures["positions"], "Cosine similarity of position embeddings")
        + "<p>Test digits (label → prediction), and where the class token looks in the last block, averaged over its "
        "heads.</p>" + picture(pictures["attention"], "Attention of the class token over test digits"),
    )


def validation(checks: Checks) -> str:
    """The section of the checks, with what failed and what could not run."""
    photographs = sum("photo" in case for case in checks.cases)
    return section(
        "Checked against float64",
        f"<p>Each backend computes every case, the output and each gradient, on random images and, in {photographs} "
        "cases, on crops of real photographs; the truth is plain convolution, concatenation and addition in float64. "
        "Accepted is twice the error of plain PyTorch at the same precision, plus a small floor, also for the worst "
        "row and column. <i>Of bound</i> is the largest error found as a share of what is accepted.</p>"
        + html_table(checks.table())
        + "".join(f"<p class='loss'>{escape(problem)}</p>" for problem in checks.problems),
    )


def _benchmark(folder: Path, rows: Sequence[Row], quick: bool) -> str:
    not_run = dict.fromkeys(f"{row.provider}: {row.reason}" for row in rows if row.reason)
    about = section(
        "Measured side by side",
        "<p>How many times faster than each rival, in one process, calls interleaved, ratio of medians; below 1 we are "
        "slower. A short measurement, beside whatever else this machine was doing: <code>fastvit bench</code> takes "
        "longer and is steadier."
        + (" <b>This quick run only shows that all works: its times mean nothing.</b>" if quick else "")
        + "</p>"
        + "".join(f"<p class='note'>Not measured: {escape(line)}</p>" for line in not_run),
    )
    return about + "".join(ratio_section(folder, op, found) for op, found in grouped(rows, lambda row: row.op).items())


def _reproduce(command: str) -> str:
    return section(
        "Do it again",
        "<p>From a checkout, <code>make demo</code>; from an installation:</p><pre>"
        + escape(
            command + "\nfastvit validate                # every case, every precision\n"
            "fastvit train --data digits --seed 0 --output out/digits\n"
            "fastvit bench --size full"
        )
        + "</pre><p class='note'>All numbers of this page are in results.json beside it, the checkpoints under "
        "train/.</p>",
    )
