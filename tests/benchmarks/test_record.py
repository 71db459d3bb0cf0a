"""The recorded results and their page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvit.benchmarks import record
from fastvit.benchmarks.rows import Row, read_json_lines, write_json_lines

RATIOS = {"timm": 1.5, "conv2d": 0.8}


def test_the_page_is_rendered_from_the_rows(tmp_path: Path) -> None:
    case = ("patch_embed", "ViT-S", "float32", "NCHW")
    rows = [
        Row(
            *case, "fastvit:cpu", "forward", 1500.0, 1400.0, 1600.0, 9, ratios=RATIOS, best_rival="conv2d", headline=0.8
        ),
        Row(*case, "timm", "forward", 2250.0, 2200.0, 2300.0, 9, rival="timm"),
        Row(*case, "conv2d", "forward", 1200.0, 1100.0, 1300.0, 9, rival="conv2d"),
        Row(*case, "linear", "forward", reason="not installed", rival="linear"),
    ]
    write_json_lines(rows, tmp_path / "results" / "some-cpu" / "patch_embed.jsonl")
    assert record.main(["--render"], tmp_path) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| **0.80x** (conv2d) | 1.50x | **0.80x** |" in page and "linear, ViT-S, forward: not installed" in page


def test_recording_writes_rows_and_page(tmp_path: Path) -> None:
    assert record.main(["--size", "tiny", "--threads", "1", "add_position"], tmp_path) == 0
    (path,) = (tmp_path / "results").glob("*/add_position.jsonl")
    rows = read_json_lines(path)
    assert rows and path.parent.name == record.machine(rows[0])
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"## {rows[0].device}" in page and "### add_position" in page


def test_an_unknown_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        record.main(["speed"], tmp_path)
    assert "unknown suite 'speed'" in capsys.readouterr().err


def test_a_machine_has_a_folder_of_its_own() -> None:
    row = Row("op", "shape", "float32", "NCHW", "timm", "forward", device="AMD EPYC, 2 threads")
    assert record.machine(row) == "amd-epyc-2-threads"
    assert record.machine(replace(row, versions={"capability": "AVX2"})) == "amd-epyc-2-threads-avx2"
