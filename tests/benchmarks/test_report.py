"""The report: one page for itself, every picture readable, losses and reasons in it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from fastvit import plots
from fastvit.benchmarks import figures, record
from fastvit.benchmarks.figures import BARS, DETAILED, batch_panels, draw_roofline, ratio_pictures
from fastvit.benchmarks.report import write_report
from fastvit.benchmarks.rows import Row, read_json_lines

LONG = "float32 to bfloat16, autocast"
RIVAL = "embed every patch of the image, then gather those that were kept"
BASE = Row(
    "patch_embed", "", "float32", "NCHW", "", "forward", repeats=9, peak_bytes=2**20,
    device="Some CPU, 2 threads", versions={"torch": "2.13.0"}, commit="0123456789ab",
    command="fastvit bench --size small", flops=4e6, moved_bytes=1e6,
    ceilings={"flops_per_us": 8000.0, "bytes_per_us": 4000.0},
)  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


def rows_of(
    shape: str = "ViT-S/16 224, batch 4",
    ratios: dict[str, float] | None = None,
    *,
    batch: int = 4,
    ours: float = 1000.0,
    **about: Any,
) -> list[Row]:
    """A case: ours, its rivals, and a yardstick that does only a part of the job."""
    ratios = {"timm": 1.5, "conv2d": 0.8, **(ratios or {})}
    base = replace(BASE, shape=shape, batch=batch)
    best = min(ratios, key=ratios.__getitem__)
    first = replace(base, provider="fastvit:cpu", ratios={**ratios, "product alone": 0.5})
    rows = [replace(first, median_us=ours, best_rival=best, headline=ratios[best])]
    for name, ratio in [*ratios.items(), ("product alone", 0.5)]:
        rows.append(replace(base, provider=name, rival=name, whole=name != "product alone", median_us=ratio * ours))
    rows = [replace(row, p20_us=0.9 * (row.median_us or 0), p80_us=1.1 * (row.median_us or 0)) for row in rows]
    return [replace(row, **about) for row in rows]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures in place of their files."""
    made: list[Any] = []

    def keep(figure: Any, path: Path) -> Path:
        made.append(figure)
        path.write_bytes(PNG)
        return path

    monkeypatch.setattr(plots, "save", keep)
    monkeypatch.setattr(figures, "save", keep)
    return made


def test_the_page_stands_alone_and_says_what_was_lost(tmp_path: Path) -> None:
    missing = rows_of(shape="ViT-<i>", median_us=None, ratios=None, headline=None, reason="<b>no</b> [kernel]")[:1]
    missing[0].ratios.clear()
    rows = [*rows_of(), *rows_of(mode="forward+backward", ratios={"conv2d": 1.2}), *missing]
    page = write_report(rows, tmp_path / "deep" / "report")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "deep" / "report" / "report.html"
    assert not re.search(r"""(?:src|href)=['"](?!data:)|url\(|@import""", text), "the page needs another file"
    for word in ("section", "table", "main", "details", "p", "h2", "td", "tr"):
        assert len(re.findall(rf"<{word}[ >]", text)) == text.count(f"</{word}>"), word
    for fact in ("<b>2 cases</b>", "1 of our rows did not run", "<b>1 won, 1 lost</b>", "<b>0.80x</b>"):
        assert fact in text, fact
    assert "our worst loss: patch_embed, ViT-S/16 224, batch 4, float32, NCHW, forward, beside conv2d" in text
    assert "<span class='loss'>0.80x</span>" in text and "<span class='win'>1.50x</span>" in text
    assert "&lt;b&gt;no&lt;/b&gt; [kernel]" in text and "<b>no" not in text and "<i>" not in text
    for fact in (rows[0].device, "torch", "2.13.0", rows[0].commit, rows[0].command, "--compare rows.jsonl"):
        assert fact in text, fact
    names = {path.name for path in page.parent.iterdir()}
    ratios = {f"ratios-patch-embed-{mode}-1.png" for mode in ("forward", "forward-backward")}
    assert names == {"report.html", "rows.jsonl", "roofline-1.png", *ratios}
    assert text.count("data:image/png;base64,") == 3
    assert all(path.read_bytes().startswith(PNG) for path in page.parent.glob("*.png"))
    assert read_json_lines(page.parent / "rows.jsonl") == rows


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none to report"):
        write_report([], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_recorded_rows_make_a_page(tmp_path: Path, drawn: list[Any]) -> None:
    recorded = [
        row for path in record.FOLDER.rglob("results/*-threads-*/*.jsonl") for row in read_json_lines(path)[:24]
    ]
    assert recorded
    text = write_report(recorded, tmp_path).read_text(encoding="utf-8")
    assert drawn and all(row.device in text and row.commit in text for row in recorded)


def test_two_machines_are_kept_apart(tmp_path: Path, drawn: list[Any]) -> None:
    text = write_report([*rows_of(), *rows_of(device="A GPU")], tmp_path).read_text(encoding="utf-8")
    assert "2 machines" in text and "<h2>patch_embed, A GPU</h2>" in text and "<th>run 2</th>" in text
    assert len(list(tmp_path.glob("roofline-*.png"))) == 2


def test_bars_are_coloured_by_outcome(tmp_path: Path, drawn: list[Any]) -> None:
    assert figures.yardsticks(rows_of()) == {"product alone"}
    ratio_pictures(tmp_path, "patch_embed", rows_of())
    (axis,) = drawn[0].axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["timm", "conv2d", "product alone (only a part)"]
    for bar, ratio, colour in zip(axis.patches, (1.5, 0.8, 0.5), (plots.BLUE, plots.ORANGE, plots.GREY), strict=True):
        assert bar.get_x() + bar.get_width() == pytest.approx(ratio)
        assert to_hex(bar.get_facecolor()) == colour
    assert axis.get_xscale() == "log" and any(set(line.get_xdata()) == {1} for line in axis.lines)
    assert "0.80x  (800.0 µs)" in [text.get_text() for text in axis.texts]


def test_many_cases_are_split_and_very_many_are_drawn_briefly(tmp_path: Path, drawn: list[Any]) -> None:
    many = [row for n in range(BARS // 2) for row in rows_of(shape=f"ViT-{n}")]
    assert len(ratio_pictures(tmp_path, "some", many)) == len(drawn) == 2  # three bars a case
    assert sum(len(figure.axes[0].patches) for figure in drawn) == 3 * BARS // 2
    drawn.clear()
    pictures = ratio_pictures(tmp_path, "all", [row for n in range(DETAILED + 21) for row in rows_of(shape=f"ViT-{n}")])
    assert [len(figure.axes[0].patches) for figure in drawn] == [BARS, DETAILED + 21 - BARS]
    assert all("against the best rival" in made.description for made in pictures)
    assert len({made.path for made in pictures}) == 2


def long_names() -> list[Row]:
    about = {"dtype": LONG, "layout": "channels_last", "mode": "forward+backward, cuda graph"}
    return [
        row
        for model in "SBLH"
        for batch in (64, 256, 1024)
        for row in rows_of(
            f"ViT-{model}/16 224, batch {batch}, 75% masked", {RIVAL: 90.0, f"{RIVAL} too": 0.02}, batch=batch, **about
        )
    ]


@pytest.mark.parametrize("brief", [False, True])
def test_long_names_are_neither_cut_nor_on_top_of_each_other(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch, brief: bool
) -> None:
    monkeypatch.setattr(figures, "DETAILED", 0 if brief else 100)
    ratio_pictures(tmp_path, "masked", long_names())
    figures.batch_pictures(tmp_path, "masked", long_names())
    draw_roofline(tmp_path / "roofline.png", long_names())
    assert len(drawn) > 2
    for figure in drawn:
        figure.canvas.draw()
        width, height = figure.bbox.size
        for axis in figure.axes:
            if not axis.get_visible():
                continue
            labels = [*axis.get_xticklabels(), *axis.get_yticklabels()]
            titles = [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label]
            for text in (*axis.texts, *labels, *titles):
                box = text.get_window_extent()
                if text.get_text() and text.get_visible() and text in (*axis.texts, *titles):
                    assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text
            boxes = [label.get_window_extent() for label in axis.get_yticklabels() if label.get_text()]
            boxes.sort(key=lambda box: box.y0)
            assert all(a.y1 <= b.y0 + 1 for a, b in zip(boxes, boxes[1:], strict=False))
            assert all(box.x0 >= -1 for box in boxes)
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1


def test_the_roofline_shows_rates_under_measured_ceilings(tmp_path: Path, drawn: list[Any]) -> None:
    half = {"flops_per_us": 16000.0, "bytes_per_us": 4000.0}
    rows = [*rows_of(), *rows_of(dtype="bfloat16", ceilings=half), *rows_of(dtype="uint8 to float32")]
    untimed = [replace(rows[0], median_us=None), replace(rows[0], flops=0.0), replace(rows[0], ceilings={})]
    assert figures.with_work([*rows, *untimed]) == rows
    draw_roofline(tmp_path / "roofline.png", rows)
    (axis,) = drawn[0].axes
    roofs = [list(zip(*line.get_data(), strict=True)) for line in axis.lines]
    assert [roof[1] for roof in roofs] == [(2.0, 8.0), (4.0, 16.0)]  # the ridges: FLOP per byte, GFLOP/s
    assert all(roof[0][1] == pytest.approx(4.0 * roof[0][0]) and roof[2][1] == roof[1][1] for roof in roofs)
    points = [tuple(points.get_offsets()[0]) for points in axis.collections]
    assert points.count((4.0, 4.0)) == 3 and len(points) == len(rows)  # 4 MFLOP in 1000 µs
    names = [text.get_text().replace("\n", " ") for text in drawn[0].legends[0].get_texts()]
    assert "ceiling: 8 GFLOP/s, 4.0 GB/s (float32; uint8 to float32)" in names and "bfloat16" in names


def test_time_against_batch_size_needs_two_of_them(tmp_path: Path, drawn: list[Any]) -> None:
    one = rows_of()
    assert batch_panels(one) == [] and batch_panels([replace(row, batch=0) for row in one]) == []
    text = write_report(one, tmp_path).read_text(encoding="utf-8")
    assert "<code>fastvit bench patch_embed --size full --report FOLDER</code>" in text
    two = [*one, *rows_of("ViT-S/16 224, batch 64", batch=64, ours=9000.0)]
    two.append(replace(two[-1], provider="timm compiled", rival="timm", median_us=5000.0))
    (panel,) = batch_panels([*two, *rows_of("ViT-B/16 224, batch 4")])
    assert panel == two
    drawn.clear()
    text = write_report(two, tmp_path).read_text(encoding="utf-8")
    assert "--size full --report FOLDER" not in text and (tmp_path / "batch-patch-embed-1.png").exists()
    axis = drawn[-1].axes[0]
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}
    assert lines["fastvit:cpu"] == [(4, 1.0), (64, 9.0)]
    assert lines["timm"] == [(4, 1.5), (64, 5.0)]  # the best setting at each size
    assert axis.get_visible() and axis.get_xscale() == axis.get_yscale() == "log"
    assert "ViT-S/16 224" in axis.get_title(loc="left") and "batch" not in axis.get_title(loc="left")
