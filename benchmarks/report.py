"""report.html: rows as one page that needs nothing beside it, losses shown like wins."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastvit.benchmarks import figures
from fastvit.benchmarks.figures import Picture
from fastvit.benchmarks.rows import Row, grouped, rivals_of, time_text, write_json_lines
from fastvit.pages import Markup, head, picture, ratio, section, table, write_page

SHOWN = 6  # pictures of a suite that stand open; the others fold out
STYLE = """
main { max-width: 1240px; }
h3 { margin: 20px 0 4px; font-size: 16px; }
summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
details table { font-size: 13px; } details td:nth-child(-n+3) { min-width: 130px; }
details td:first-child { min-width: 180px; } .reason { display: inline-block; min-width: 180px; }
"""
Suites = dict[str, list[Row]]


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """Write report.html, its pictures and rows.jsonl into a folder; the path of the page.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows: there are none to report")
    folder.mkdir(parents=True, exist_ok=True)
    suites = _suites(rows)
    body = [
        _head(rows),
        *[ratio_section(folder, name, suite) for name, suite in suites.items()],
        _roofline(folder, rows),
        _batches(folder, suites),
        _all_rows(suites),
        _environment(rows),
        _reproduce(rows),
    ]
    write_json_lines(rows, folder / "rows.jsonl")
    return write_page(folder / "report.html", "FastViT benchmarks", "\n".join(body), STYLE)


def _suites(rows: Sequence[Row]) -> Suites:
    """Rows by op, and by device where there are several."""
    several = len({row.device for row in rows}) > 1
    return grouped(rows, lambda row: f"{row.op}, {row.device}" if several else row.op)


def _judged(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """Our rows that have a rival to be held to, with the ratio to the best."""
    return [(row.headline, row) for row in rows if row.headline is not None]


def _score(judged: Sequence[tuple[float, Row]]) -> str:
    lost = sum(value < 1 for value, _ in judged)
    return f"{len(judged) - lost} won, {lost} lost"


def _head(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if row.is_ours]
    measured = {(row.device, row.case) for row in ours if row.median_us is not None}
    missing = sum(row.median_us is None for row in ours)
    judged = _judged(ours)
    devices = list(dict.fromkeys(row.device or "unknown" for row in rows))
    ran = f"measured; {missing} of our rows did not run" if missing else "measured; every row of ours ran"
    cards = [(f"{len(measured)} case" + "s" * (len(measured) != 1), ran, "bad" if missing else "")]
    if judged:
        worst, row = min(judged, key=lambda pair: pair[0])
        name, kind = ("loss", "bad") if worst < 1 else ("ratio", "good")
        about = f"our worst {name}: {row.op}, {row.label}, {row.mode}, beside {row.best_rival}"
        cards.append((_score(judged), "our rows against the best rival of each case", ""))
        cards.append((f"{worst:.2f}x", about, kind))
    several = len(devices) > 1
    cards.append((f"{len(devices)} machines", "; ".join(devices), "") if several else (devices[0], "the machine", ""))
    return head(
        "FastViT benchmarks",
        "Every contender in one process, taking turns, after its result was checked. A ratio is the rival's median "
        "over ours: above 1 we are faster. Of a rival's settings the best one counts.",
        cards,
    )


def ratio_section(folder: Path, name: str, rows: Sequence[Row]) -> str:
    """The section of a suite: its score, its pictures, which are written into `folder`, and its ratios as a table."""
    judged = _judged(rows)
    text = f"<p>{_score(judged)} against the best rival of each case.</p>" if judged else ""
    partial = sorted(figures.yardsticks(rows))
    if partial:
        text += f"<p class='note'>{escape(', '.join(partial))}: only a part of the job, a yardstick and no rival.</p>"
    return section(
        name,
        text + _pictures(figures.ratio_pictures(folder, name, rows)) + _folded("Ratios as a table", _ratio_table(rows)),
    )


def _ratio_table(rows: Sequence[Row]) -> str:
    rivals = rivals_of(rows)
    lines = [
        [
            row.label,
            row.mode,
            row.provider,
            time_text(row.median_us),
            ratio(row.headline),
            row.best_rival,
            *[ratio(row.ratios.get(rival)) for rival in rivals],
        ]
        for row in rows
        if row.is_ours and row.median_us is not None
    ]
    heads = ["case", "mode", "provider", "median", "best rival", "", *rivals]
    return table(heads, lines, numbers=[3, 4, *range(6, len(heads))])


def _roofline(folder: Path, rows: Sequence[Row]) -> str:
    devices = grouped(figures.with_work(rows), lambda row: row.device)
    text = (
        "<p>How fast each case computes, over how much it computes for each byte that any solution must move. The "
        "lines are this machine's own ceilings, the rate of a large matrix product and the bandwidth of a copy, "
        "measured in the same run. Data that stay in a cache can lie above the slope.</p>"
        if devices
        else "<p>None of these rows states its work and the machine's ceilings: <code>fastvit bench patch_embed "
        "--report FOLDER</code> measures rows that do.</p>"
    )
    for number, (device, known) in enumerate(devices.items(), start=1):
        drawn = figures.draw_roofline(folder / f"roofline-{number}.png", known)
        title = f"<h3>{escape(device)}</h3>" if len(devices) > 1 else ""
        text += title + picture(drawn, f"Roofline of {device}")
    return section("Roofline", text)


def _batches(folder: Path, suites: Suites) -> str:
    text = "<p>Of a rival, the best setting at each batch size.</p>"
    for name, rows in suites.items():
        if pictures := figures.batch_pictures(folder, name, rows):
            text += f"<h3>{escape(name)}</h3>" + _pictures(pictures)
        else:
            text += f"<p class='note'>{escape(name)}: no shape was measured at two batch sizes; <code>fastvit bench "
            text += f"{escape(rows[0].op)} --size full --report FOLDER</code> measures several.</p>"
    return section("Time against batch size", text)


def _all_rows(suites: Suites) -> str:
    tables = [_folded(f"{name}: {len(rows)} rows", _row_table(rows)) for name, rows in suites.items()]
    return section("All rows", "<p>Medians with the 20th and 80th percentile.</p>" + "".join(tables))


def _row_table(rows: Sequence[Row]) -> str:
    """Every row; a case is named in the first of its rows alone."""
    heads = ["case", "mode", "provider", "median", "p20 to p80", "vs best", "of floor", "peak memory"]
    lines = [
        [
            *(("", "") if row.case == above else (row.label, row.mode)),
            row.provider,
            time_text(row.median_us),
            row.spread_text(" to "),
            ratio(row.headline) if row.is_ours else "",
            row.floor_text(),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f} MiB",
            Markup(f"<span class='reason'>{escape(row.reason)}</span>") if row.reason else "",
        ]
        for above, row in zip([None, *(row.case for row in rows)], rows, strict=False)
    ]
    if any(row.reason for row in rows):
        heads.append("why it did not run")
    return table(heads, [line[: len(heads)] for line in lines], numbers=range(3, 8))


def _environment(rows: Sequence[Row]) -> str:
    """A column for each run: what ran where, with which versions."""
    runs = list(grouped(rows, lambda row: (row.device, tuple(row.versions.items()), row.commit, row.command)).values())
    firsts = [run[0] for run in runs]
    names = dict.fromkeys(name for row in firsts for name in row.versions)
    lines = [
        ["device", *[row.device or "unknown" for row in firsts]],
        *[[name, *[row.versions.get(name) or "none" for row in firsts]] for name in names],
        ["commit", *[row.commit or "unknown" for row in firsts]],
        ["command", *[row.command for row in firsts]],
        ["rows", *[str(len(run)) for run in runs]],
    ]
    heads = ["", *[f"run {number}" for number in range(1, len(runs) + 1)]] if len(runs) > 1 else ["", ""]
    return section("Environment", table(heads, lines))


def _reproduce(rows: Sequence[Row]) -> str:
    commands = "\n".join(dict.fromkeys(row.command for row in rows if row.command))
    return section(
        "Do it again",
        f"<p>These rows come from</p><pre>{escape(commands)}</pre>"
        "<p>They are in rows.jsonl beside this page. To draw the page again without measuring, and to compare with "
        "a later run:</p><pre>fastvit bench --rows rows.jsonl --report FOLDER\n"
        "fastvit bench --compare rows.jsonl LATER/rows.jsonl</pre>",
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    shown = [picture(made.path, made.description) for made in pictures]
    more = _folded(f"{len(shown) - SHOWN} more pictures", "".join(shown[SHOWN:])) if len(shown) > SHOWN else ""
    return "".join(shown[:SHOWN]) + more


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
