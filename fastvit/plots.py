"""What our pictures share: one style, figures that need no display, and bars of ratios.

Colours are distinguishable in grey and for the colour-blind.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from fastvit.files import written_whole

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#b9bec6",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
}

Draw = TypeVar("Draw", bound=Callable[..., Path])


def styled(draw: Draw) -> Draw:
    """Draw in our style and leave the caller's matplotlib as it was."""

    @wraps(draw)
    def drawing(*arguments: Any, **keywords: Any) -> Path:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*arguments, **keywords)

    return drawing  # type: ignore[return-value]


def new_figure(rows: int, columns: int, size: tuple[float, float], **keywords: Any) -> tuple[Any, Any]:
    """A figure of `size` inches that needs no display, and its axes as an array of rows and columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    with written_whole(path) as fresh:
        figure.savefig(fresh, dpi=130, format="png")
    return path


@dataclass(frozen=True)
class Bar:
    """How many times faster than `label` we are; `note` stands behind the number. A `muted` bar is no verdict."""

    label: str
    ratio: float
    note: str = ""
    muted: bool = False

    @property
    def colour(self) -> str:
        return GREY if self.muted else BLUE if self.ratio >= 1 else ORANGE


def ranked_bars(
    ratios: Mapping[str, float], partial: Collection[str], ours: float, text: Callable[[float], str]
) -> list[Bar]:
    """A bar for each rival, our greatest win first; those in `partial`, which do a part of the job, muted and last.

    `ours` is our time, and `text` writes a time of that unit.
    """
    bars = [
        Bar(rival + " (only a part)" * (rival in partial), ratio, f"({text(ratio * ours)})", rival in partial)
        for rival, ratio in ratios.items()
    ]
    return sorted(bars, key=lambda bar: (bar.muted, -bar.ratio))


HEADING = 100  # characters in a line
LABEL, SMALL_LABEL = 30, 46  # characters in a line of a bar's name; longer ones are smaller, in two lines at most
MARKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500]


@styled
def draw_ratios(path: Path, groups: Sequence[tuple[str, Sequence[Bar]]], title: str = "") -> Path:
    """Bars in groups, each under its heading, on a logarithmic axis: right of 1 FastViT is faster, left slower."""
    headings = [textwrap.wrap(heading, HEADING) for heading, _ in groups]
    lines = sum(0.3 * len(bars) + 0.5 for _, bars in groups) + sum(0.24 * (len(h) - 1) for h in headings if h)
    figure, axes = new_figure(1, 1, (11, 1.0 + lines))
    axis, place = axes[0][0], 0.0
    bars = [bar for _, group in groups for bar in group]
    low, high = min([0.8, *(bar.ratio for bar in bars)]) / 1.25, max([1.25, *(bar.ratio for bar in bars)]) * 1.5
    ticks: list[float] = []
    for heading, (_, group) in zip(headings, groups, strict=True):
        place = _draw_heading(axis, low, place, heading)
        ticks += [place + number for number in range(1, len(group) + 1)]
        place += len(group) + 1.6
    for tick, bar in zip(ticks, bars, strict=True):
        axis.barh(tick, bar.ratio - 1, left=1, height=0.74, color=bar.colour)
        axis.text(max(bar.ratio, 1) * 1.02, tick, f"{bar.ratio:.2f}x  {bar.note}", va="center", fontsize=9)
    axis.axvline(1, color="#1c2127", lw=1)
    axis.set_xscale("log")
    marks = _ratio_marks(low, high)
    axis.set_xticks(marks, [f"{mark:g}x" for mark in marks])
    axis.minorticks_off()
    axis.set(xlim=(low, high), ylim=(place - 0.9, -0.8), xlabel="how many times faster than this rival FastViT is")
    names = [textwrap.fill(bar.label, SMALL_LABEL, max_lines=2, placeholder=" …") for bar in bars]
    axis.set_yticks(ticks, names, fontsize=8 if any(len(name) > LABEL for name in names) else 11)
    axis.grid(False, axis="y")
    if title:
        axis.set_title(title)
    return save(figure, path)


def _draw_heading(axis: Any, left: float, place: float, lines: Sequence[str]) -> float:
    """Write the heading of a group, if it has one; the place of its last line."""
    if not lines:
        return place - 1
    last = place + 0.8 * max(0, len(lines) - 1)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    text = "\n".join(f" {line}" for line in lines)
    axis.text(left, (place + last) / 2, text, fontweight="bold", fontsize=10, va="center", bbox=box)
    return last


def _ratio_marks(low: float, high: float) -> list[float]:
    """Marks of a logarithmic axis; on a very wide one they would run into each other."""
    marks = [10.0**power for power in range(-6, 7)] if high > 1000 * low else MARKS
    return [mark for mark in marks if low <= mark <= high]
