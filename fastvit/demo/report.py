"""report.html: one file that needs nothing beside it, from the demo's results and pictures."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from fastvit.pages import head, picture, ratio, section, table, write_page


def write_report(path: Path, results: dict[str, Any], pictures: dict[str, Path]) -> None:
    """Write the page. `pictures` by name: curves, first_losses, positions, attention, benchmark."""
    body = "\n".join(
        [
            _head(results),
            _training(results, pictures),
            _timm(results, pictures),
            _inside(results, pictures),
            _validation(results),
            _benchmark(results, pictures),
            _environment(results),
            _reproduce(results),
        ]
    )
    write_page(path, "FastViT demo", body)


def _head(results: dict[str, Any]) -> str:
    train, checks = results["train"], results["validate"]
    gap = results["timm"]
    facts = [
        (
            f"{train['test_accuracy']:.2%}",
            f"mean test accuracy on {train['test_images']} digits, {len(train['seeds'])} seeds",
            "" if train["judged"] is False else "good" if train["ok"] else "bad",
        ),
        (
            f"{checks['passed']:,} passed, {checks['failed']:,} failed"
            if checks["failed"]
            else f"{checks['passed']:,} passed",
            "checks against float64, forward and gradients",
            "good" if checks["ok"] else "bad",
        ),
        (
            "skipped" if gap["skipped"] else f"{gap['largest_difference']:.1e}",
            gap["skipped"] or f"largest difference to timm in {gap['steps']} losses",
            "" if gap["skipped"] else "good" if gap["ok"] else "bad",
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


def _training(results: dict[str, Any], pictures: dict[str, Path]) -> str:
    train = results["train"]
    rows = [
        [
            f"{seed['seed']}",
            f"{seed['test_accuracy']:.2%}",
            f"{seed['train_loss']:.4f}",
            f"{seed['test_loss']:.4f}",
            f"{seed['seconds']:.0f} s",
        ]
        for seed in train["seeds"]
    ]
    seeds = table(["seed", "test accuracy", "training loss", "test loss", "time"], rows, numbers=range(1, 5))
    return section(
        "Training on real images",
        f"<p>{escape(train['model'])}: {train['parameters']:,} parameters, patch 2, one channel, "
        f"{train['epochs']} epochs on {train['train_images']:,} of scikit-learn's bundled handwritten "
        f"digits, 8×8 pixels; tested on the other {train['test_images']}, in a split that is the same "
        "for every seed. The accuracy is the last epoch's, "
        "not the best. The training loss has label smoothing in it, so it stays above the test loss.</p>"
        + picture(pictures["curves"], "Loss and test accuracy over the epochs")
        + seeds,
    )


def _timm(results: dict[str, Any], pictures: dict[str, Path]) -> str:
    found = results["timm"]
    if found["skipped"]:
        text = f"<p>Not compared: {escape(found['skipped'])}</p>"
    else:
        text = (
            f"<p>timm's <code>VisionTransformer</code> and ours start from the same weights and see the same "
            f"batches with the same optimiser: ours takes the raw uint8 digits, timm's the normalised float ones. "
            f"Over the first {found['steps']} steps the losses differ by at most {found['largest_difference']:.1e} "
            f"(accepted: {found['tolerance']:.0e}; fp32 rounds at 1e-7, and training multiplies the differences).</p>"
        ) + picture(pictures["first_losses"], "The first losses of FastViT and timm, and their difference")
    return section("The same losses as timm", text)


def _inside(results: dict[str, Any], pictures: dict[str, Path]) -> str:
    near = results["train"]["position_similarity"]
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


def _validation(results: dict[str, Any]) -> str:
    checks = results["validate"]
    rows = [
        [
            line["backend"],
            line["device"],
            line["op"],
            line["dtype"],
            f"{line['cases']} ({line['photo_cases']})",
            f"{line['passed']}",
            f"{line['failed']}",
            f"{line['strain']:.0%}",
        ]
        for line in checks["summary"]
    ]
    heads = ["backend", "on", "op", "compute", "cases (photographs)", "passed", "failed", "of bound"]
    missing = "".join(f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in checks["not_run"].items())
    failed = "".join(
        f"<li>{escape(row['backend'])} {escape(row['op'])} {escape(row['dtype'])}, {escape(row['case'])}, "
        f"{escape(row['quantity'])}: {escape(row['reason'] or 'error over its bound')}</li>"
        for row in checks["failures"][:20]
    )
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in checks["problems"])
    return section(
        "Checked against float64",
        "<p>Each backend computes every case, the output and each gradient, on random images and on crops of "
        "real photographs; the truth is plain convolution, concatenation and addition in float64. Accepted is twice "
        "the error of plain PyTorch at the same precision, plus a small floor, also for the worst row and column. "
        "<i>Of bound</i> is the largest error found as a share of what is accepted.</p>"
        + table(heads, rows, numbers=range(4, 8))
        + (f"<p class='loss'>Failed:</p><ul>{failed}{problems}</ul>" if failed or problems else "")
        + (f"<p>Cannot run here:</p><ul class='note'>{missing}</ul>" if missing else ""),
    )


def _benchmark(results: dict[str, Any], pictures: dict[str, Path]) -> str:
    ours = [row for row in results["bench"] if row["ratios"]]
    rivals = list(dict.fromkeys(name for row in ours for name in row["ratios"]))
    rows = [
        [
            f"{row['op']}, {row['shape']}",
            row["dtype"],
            row["mode"],
            row["provider"],
            f"{row['median_us'] / 1000:.2f} ms",
            *[ratio(row["ratios"].get(rival)) for rival in rivals],
        ]
        for row in ours
    ]
    partial = {row["rival"] for row in results["bench"] if not row["whole"]}
    names = [f"{rival} (only a part)" if rival in partial else rival for rival in rivals]
    heads = ["case", "precision", "mode", "provider", "median", *names]
    not_run = dict.fromkeys(f"{r['provider']}: {r['reason']}" for r in results["bench"] if r["reason"])
    return section(
        "Measured side by side",
        "<p>How many times faster than each rival, in one process, calls interleaved, ratio of medians; below 1 we are "
        "slower. A short measurement, beside whatever else this machine was doing: <code>fastvit bench</code> takes "
        "longer and is steadier."
        + (" <b>This quick run only shows that all works: its times mean nothing.</b>" if results["quick"] else "")
        + "</p>"
        + (picture(pictures["benchmark"], "Benchmark bars") if "benchmark" in pictures else "")
        + table(heads, rows, numbers=range(4, len(heads)))
        + "".join(f"<p class='note'>Not measured: {escape(line)}</p>" for line in not_run),
    )


def _environment(results: dict[str, Any]) -> str:
    found = results["environment"]
    rows = [[name, value or "not installed"] for name, value in found["versions"].items()]
    system = found["system"]
    rows += [
        ["processor", f"{system['processor']}, {system['cores']} cores, {system['cpu_capability']}"],
        ["platform", system["platform"]],
        ["GPU", ", ".join(gpu["name"] for gpu in found["gpus"]) or "none"],
        ["date", results["date"]],
    ]
    return section("Environment", table(["", ""], rows))


def _reproduce(results: dict[str, Any]) -> str:
    return section(
        "Do it again",
        "<p>From a checkout, <code>make demo</code>; from an installation:</p><pre>"
        + escape(
            results["command"] + "\nfastvit validate                # every case, every precision\n"
            "fastvit train --data digits --seed 0 --output out/digits\n"
            "fastvit bench --size full"
        )
        + "</pre><p class='note'>All numbers of this page are in results.json beside it, the checkpoints under "
        "train/.</p>",
    )
