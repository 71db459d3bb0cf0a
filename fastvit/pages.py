"""HTML pages that need nothing beside them: style, sections, tables and embedded pictures.

Texts are escaped here; a `body` is HTML already, and so is `Markup`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fastvit.files import written_whole

CSS = """
:root { --ink: #1c2127; --soft: #5b6470; --line: #e3e6ea; --accent: #0072b2; --good: #00734f; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, Inter,
       "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { margin: 0 0 4px; font-size: 34px; letter-spacing: -0.02em; }
h2 { margin: 0 0 8px; font-size: 21px; letter-spacing: -0.01em; }
p { margin: 0 0 12px; max-width: 74ch; }
.lead { color: var(--soft); font-size: 18px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 24px 28px; margin-top: 20px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 24px; }
.fact { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.fact b { display: block; font-size: 26px; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: 14px; }
.good b { color: var(--good); } .bad b { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 6px 0 10px; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
td, th { padding: 6px 12px 6px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.loss { color: var(--bad); font-weight: 600; } .win { color: var(--good); font-weight: 600; }
img { display: block; max-width: 100%; height: auto; margin: 10px auto; }
code, pre { font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: #f5f6f8; border-radius: 8px; padding: 12px 14px; overflow-x: auto; }
.note { color: var(--soft); font-size: 14px; }
"""


class Markup(str):
    """Text that is HTML already."""


def write_page(path: Path, title: str, body: str, style: str = "") -> Path:
    """Write a page, whole or not at all. `body` is HTML; `style` is more CSS."""
    text = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{CSS}{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
    with written_whole(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


def head(title: str, lead: str, cards: Iterable[tuple[str, str, str]], note: str = "") -> str:
    """The top of a page. A card is a big text, a small one and its kind: "good", "bad" or ""."""
    facts = "".join(
        f"<div class='fact {kind}'><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small, kind in cards
    )
    aside = f"<p class='note'>{escape(note)}</p>" if note else ""
    return f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>{aside}<div class='facts'>{facts}</div>"


def section(title: str, body: str) -> str:
    """A section with its heading; `body` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def picture(path: Path, description: str) -> str:
    """A PNG file inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img src='data:image/png;base64,{data}' alt='{escape(description)}'>"


def ratio(value: float | None) -> Markup:
    """How many times faster we are: coloured as a win from 1, as a loss below."""
    if value is None:
        return Markup("–")
    return Markup(f"<span class='{'win' if value >= 1 else 'loss'}'>{value:.2f}x</span>")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table; the columns in `numbers` are aligned on the right. Empty `heads` leave the head out."""
    right = set(numbers)

    def cell(tag: str, index: int, text: str) -> str:
        kind = " class='number'" if index in right else ""
        return f"<{tag}{kind}>{text if isinstance(text, Markup) else escape(text)}</{tag}>"

    lines = ["".join(cell("td", i, text) for i, text in enumerate(row)) for row in rows]
    top = "".join(cell("th", i, text) for i, text in enumerate(heads)) if any(heads) else ""
    return (
        f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )
