"""The recorded results and their page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvit.benchmarks import record
from fastvit.benchmarks.rows import Row, read_json_lines, write_json_lines


def test_the_page_is_rendered_from_the_rows(tmp_path: Path, four_rows: list[Row]) -> None:
    write_json_lines(four_rows, tmp_path / "results" / "some-cpu" / "patch_embed.jsonl")
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


def test_the_readme_has_the_table_of_the_recorded_rows(tmp_path: Path, four_rows: list[Row]) -> None:
    folder, page = tmp_path / "benchmarks", tmp_path / "README.md"
    ours = [replace(row, provider=record.NATIVE) for row in four_rows if row.is_ours]
    write_json_lines(ours, folder / "results" / "some-cpu" / "patch_embed.jsonl")
    page.write_text("above\n" + "".join(record.MARKS) + "below\n")
    assert record.main(["--render"], folder) == 0
    assert "| `patch_embed` | 1 | **0.80x** | **0.80x** | **0.80x** |" in page.read_text()
    assert page.read_text().startswith("above\n") and page.read_text().endswith("below\n")
    root = Path(record.__file__).resolve().parents[1]
    paths = [path for path in sorted(root.glob("benchmarks/results/*/*.jsonl")) if path.parent.name != record.COUNTED]
    table = record.summary([(path.parent.name, path.stem, read_json_lines(path)) for path in paths])
    assert table in (root / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="the marks of the recorded table are gone"):
        record.with_summary("no marks", table)


def test_a_campaign_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows stand in one file; of a case that several stages measured, the last one's count."""
    gpu = {"device": "NVIDIA H100", "commit": "0123456789ab"}
    embed, add = ("patch_embed", "ViT-S", "float32", "NCHW"), ("add_position", "ViT-S", "float32", "contiguous")

    def row(case: tuple[str, str, str, str], provider: str, mode: str, stage: str, us: float | None) -> Row:
        return Row(*case, provider, mode, us, us, us, rival=provider, command=f"make gpu STAGE={stage}", **gpu)

    rows = [
        Row("ceiling", "8192", "bfloat16", "", "torch", "product", 1.0, **gpu),
        row(embed, "fastvit:triton", "forward", "patch_embed", 10.0),
        row(embed, "timm compiled", "forward", "patch_embed", None),
        row(embed, "fastvit:triton", "forward+backward", "patch_embed", 20.0),
        row(add, "fastvit:triton", "forward", "add_position", 5.0),
        row(embed, "fastvit:triton", "forward", "compiled", 11.0),
        row(embed, "timm compiled", "forward", "compiled", 12.0),
    ]
    source = tmp_path / "bench.jsonl"
    write_json_lines(rows, source)
    assert record.main(["--from", str(source)], tmp_path) == 0
    folder = tmp_path / "results" / "nvidia-h100"
    assert {path.name for path in folder.iterdir()} == {"patch_embed.jsonl", "add_position.jsonl"}
    assert read_json_lines(folder / "patch_embed.jsonl") == [rows[5], rows[6], rows[3]]
    assert read_json_lines(folder / "add_position.jsonl") == [rows[4]]
    assert "## NVIDIA H100" in (tmp_path / "RESULTS.md").read_text()
    capsys.readouterr()
    for wrong, words in (("nowhere", "No such file"), ("page", "not a benchmark row"), ("empty", "no rows of masked")):
        (tmp_path / "page").write_text("{")
        write_json_lines(rows[:1], tmp_path / "empty")
        with pytest.raises(SystemExit):
            record.main(["--from", str(tmp_path / wrong), "masked"], tmp_path)
        assert words in capsys.readouterr().err


def test_an_unknown_suite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        record.main(["speed"], tmp_path)
    assert "unknown suite 'speed'" in capsys.readouterr().err


def test_a_machine_has_a_folder_of_its_own() -> None:
    row = Row("op", "shape", "float32", "NCHW", "timm", "forward", device="AMD EPYC, 2 threads")
    assert record.machine(row) == "amd-epyc-2-threads"
    assert record.machine(replace(row, versions={"capability": "AVX2"})) == "amd-epyc-2-threads-avx2"
