"""The report's pictures: ratios to the rivals, the roofline, time against batch size. Each is a PNG file."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvit.benchmarks.rows import OURS, Row, grouped, time_text
from fastvit.plots import BLUE, GREY, Bar, draw_ratios, new_figure, ranked_bars, save, styled

BARS = 60  # in a picture: more of them are too tall to look at
DETAILED = 40  # cases of a mode: with more, each has one bar, against the best rival
PANELS = 18  # in a picture
LABEL, NOTE = 40, 50  # characters of a name in a legend, and of a note behind a bar
INK = "#1c2127"
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*<>"
COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b4fa3", "#8c6d31")  # beside our blue


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    description: str


def yardsticks(rows: Sequence[Row]) -> set[str]:
    """Rivals that do only a part of the job."""
    return {row.rival for row in rows if not row.whole}


def ratio_pictures(folder: Path, suite: str, rows: Sequence[Row]) -> list[Picture]:
    """Bars against every rival, the pictures of a suite apart by mode; of very many cases, against the best alone."""
    pictures = []
    partial = yardsticks(rows)
    for mode, ours in grouped((row for row in rows if row.ratios), lambda row: row.mode).items():
        brief = len(ours) > DETAILED
        parts = _brief_parts(ours) if brief else _detailed_parts(ours, partial)
        for number, groups in enumerate(parts, start=1):
            title = f"{suite}, {mode}" + (": against the best rival of each case" if brief else "")
            title += f" ({number} of {len(parts)})" if len(parts) > 1 else ""
            path = folder / f"{_slug('ratios', suite, mode, number)}.png"
            pictures.append(Picture(draw_ratios(path, groups, title), f"Ratios to the rivals: {title}"))
    return pictures


def _detailed_parts(ours: Sequence[Row], partial: set[str]) -> list[list[tuple[str, list[Bar]]]]:
    """A group of bars for each row, in parts of about BARS bars."""
    parts: list[list[tuple[str, list[Bar]]]] = [[]]
    for row in ours:
        heading = f"{row.label}: {row.provider} takes {time_text(row.median_us)}"
        bars = ranked_bars(row.ratios, partial, row.median_us or 0.0, time_text)
        if parts[-1] and sum(len(group) for _, group in parts[-1]) + len(bars) > BARS:
            parts.append([])
        parts[-1].append((heading, bars))
    return parts


def _brief_parts(ours: Sequence[Row]) -> list[list[tuple[str, list[Bar]]]]:
    """A bar for each row, in parts of BARS."""
    bars = []
    for row in ours:
        if row.headline is not None:
            note = textwrap.shorten(f"({row.provider} beside {row.best_rival})", NOTE, placeholder=" …)")
            bars.append(Bar(row.label, row.headline, note))
    return [[("", bars[start : start + BARS])] for start in range(0, len(bars), BARS)]


@styled
def draw_roofline(path: Path, rows: Sequence[Row]) -> Path:
    """Achieved rate over arithmetic intensity, a panel for each op, under the machine's measured ceilings.

    `rows`: of one device, each with its work, its ceilings and a time.
    """
    ops = grouped(rows, lambda row: row.op)
    colours = dict(zip(dict.fromkeys(row.dtype for row in rows), (BLUE, *COLOURS) * len(rows), strict=False))
    markers = dict(zip(dict.fromkeys(row.mode for row in rows), MARKERS * len(rows), strict=False))
    roofs = grouped(rows, lambda row: (row.ceilings["flops_per_us"], row.ceilings["bytes_per_us"]))
    ridges = [flops / moved for flops, moved in roofs]
    reach = [*ridges, *(row.flops / row.moved_bytes for row in rows)]
    low, high = min(reach) / 3, max(reach) * 3
    figure, axes = _panels(len(ops), 2, 4.0, 1.5, sharex=True, sharey=True)
    for axis, (op, mine) in zip(axes, ops.items(), strict=True):
        for (flops, moved), style in zip(roofs, LINES * len(roofs), strict=False):
            places = [low, flops / moved, high]
            axis.plot(places, [min(flops, moved * place) / 1000 for place in places], color=INK, ls=style, lw=1.3)
        for row in sorted(mine, key=lambda row: row.is_ours):
            _draw_point(axis, row, colours[row.dtype], markers[row.mode])
        axis.set(xscale="log", yscale="log", title=op, xlabel="FLOP per byte", ylabel="GFLOP/s")
        _plain_numbers(axis.xaxis)
        _plain_numbers(axis.yaxis)
    figure.legend(handles=_roofline_legend(colours, markers, roofs), loc="outside lower center", ncols=2, frameon=False)
    return save(figure, path)


def _panels(count: int, columns: int, height: float, more: float, **shared: bool) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, as many as are needed in at most so many columns; a row is `height` inches high."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, axes = new_figure(lines, columns, (11, height * lines + more), **shared)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat[:count]


def _draw_point(axis: Any, row: Row, colour: str, marker: str) -> None:
    assert row.median_us is not None
    place, rate = row.flops / row.moved_bytes, row.flops / row.median_us / 1000
    if row.is_ours:
        axis.scatter(place, rate, s=62, marker=marker, color=colour, edgecolor="white", linewidth=0.8, zorder=3)
    else:
        axis.scatter(place, rate, s=14, color=GREY, alpha=0.6, linewidth=0, zorder=2)


def _roofline_legend(
    colours: dict[str, str], markers: dict[str, str], roofs: dict[tuple[float, float], list[Row]]
) -> list[Any]:
    from matplotlib.lines import Line2D

    def dot(label: str, colour: str, marker: str, size: float = 7) -> Any:
        return Line2D([], [], ls="", color=colour, marker=marker, ms=size, label=textwrap.fill(label, 60))

    def roof(number: int, limits: tuple[float, float], rows: Sequence[Row]) -> Any:
        dtypes = "; ".join(dict.fromkeys(row.dtype for row in rows))
        label = f"ceiling: {limits[0] / 1000:,.0f} GFLOP/s, {limits[1] / 1000:,.1f} GB/s ({dtypes})"
        return Line2D([], [], color=INK, ls=LINES[number % len(LINES)], lw=1.3, label=textwrap.fill(label, 60))

    left = [dot(dtype, colour, "o") for dtype, colour in colours.items()]
    right = [dot(mode, INK, marker) for mode, marker in markers.items()]
    right += [dot("rivals", GREY, "o", 4)]
    right += [roof(number, limits, rows) for number, (limits, rows) in enumerate(roofs.items())]
    # The legend is filled column by column, both of the same length.
    blanks = [Line2D([], [], ls="", label=" ")] * abs(len(left) - len(right))
    return left + blanks + right if len(left) < len(right) else left + right + blanks


def with_work(rows: Iterable[Row]) -> list[Row]:
    """Rows that have a place on a roofline."""
    return [row for row in rows if row.median_us and row.flops and row.moved_bytes and row.ceilings]


def batch_panels(rows: Iterable[Row]) -> list[list[Row]]:
    """Timed rows that differ in provider and batch size alone, where there are at least two sizes."""
    timed = (row for row in rows if row.median_us and row.batch)
    panels = grouped(timed, lambda row: (_without_batch(row), row.dtype, row.layout, row.mode))
    return [panel for panel in panels.values() if len({row.batch for row in panel}) > 1]


def batch_pictures(folder: Path, suite: str, rows: Sequence[Row]) -> list[Picture]:
    """Time against batch size, a panel for each model, dtype, layout and mode of a suite."""
    panels = batch_panels(rows)
    parts = [panels[start : start + PANELS] for start in range(0, len(panels), PANELS)]
    names = dict.fromkeys(_line_name(row) for panel in panels for row in panel)
    rivals = [name for name in names if not name.startswith(OURS)]
    ours = [name for name in names if name.startswith(OURS)]
    colours = {
        **dict(zip(ours, (BLUE, INK) * len(ours), strict=False)),
        **dict(zip(rivals, COLOURS * len(rivals), strict=False)),
    }
    pictures = []
    for number, part in enumerate(parts, start=1):
        path = folder / f"{_slug('batch', suite, number)}.png"
        pictures.append(Picture(_draw_batches(path, part, colours), f"Time against batch size: {suite} ({number})"))
    return pictures


@styled
def _draw_batches(path: Path, panels: Sequence[Sequence[Row]], colours: dict[str, str]) -> Path:
    figure, axes = _panels(len(panels), 3, 3.0, 0.8)
    drawn: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        for name, points in _best_times(panel).items():
            style = _line_style(name, colours)
            (drawn[name],) = axis.plot(
                list(points), [value / 1000 for value in points.values()], label=textwrap.fill(name, LABEL), **style
            )
        row, batches = panel[0], sorted({row.batch for row in panel})
        about = (_without_batch(row), f"{row.dtype}, {row.layout}", row.mode)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="ms")
        axis.set_title("\n".join(textwrap.fill(line, 46) for line in about), fontsize=8.5)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        _plain_numbers(axis.yaxis)
        axis.tick_params(labelsize=9)
    figure.legend(handles=list(drawn.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def _best_times(panel: Sequence[Row]) -> dict[str, dict[int, float]]:
    """For each line its time by batch size: of ours as it is, of a rival its best setting."""
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(panel, key=lambda row: row.batch):
        assert row.median_us is not None
        line = lines.setdefault(_line_name(row), {})
        line[row.batch] = min(row.median_us, line.get(row.batch, row.median_us))
    return lines


def _line_name(row: Row) -> str:
    return row.provider if row.is_ours else row.rival or row.provider


def _line_style(name: str, colours: dict[str, str]) -> dict[str, Any]:
    if name.startswith(OURS):
        return {"color": colours[name], "lw": 2.4, "marker": "o", "ms": 5, "zorder": 3}
    marker = MARKERS[list(colours).index(name) % len(MARKERS)]
    return {"color": colours[name], "lw": 1.2, "marker": marker, "ms": 4}


def _without_batch(row: Row) -> str:
    return re.sub(rf",? ?\bbatch {row.batch}\b", "", row.shape).strip(", ")


def _plain_numbers(axis: Any) -> None:
    """Marks of a logarithmic axis as 0.5, 1 and 2,000, few enough to be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1, 1.5, 2, 3, 5, 7) if high < 8 * low else (1, 2, 5) if high < 200 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _slug(*parts: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")
