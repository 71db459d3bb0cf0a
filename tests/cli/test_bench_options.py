"""`fastvit bench`: reports, recorded rows and comparisons, and which options go together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastvit.benchmarks import runner
from fastvit.benchmarks.rows import Row, read_json_lines, write_json_lines
from fastvit.benchmarks.traffic import suite

Cli = Callable[..., tuple[int, str, str]]
ROW = Row(
    "patch_embed", "ViT-S, batch 4", "float32", "NCHW", "fastvit:cpu", "forward", 100.0, 98.0, 102.0,
    ratios={"timm": 0.9}, best_rival="timm", headline=0.9, device="Some CPU, 2 threads", versions={"torch": "2.13"},
)  # fmt: skip
TIMM = replace(ROW, provider="timm", rival="timm", median_us=90.0, p20_us=89.0, p80_us=91.0, ratios={}, headline=None)
COUNTED = suite.TrafficRow(
    "timm", "plain", "float32", "ViT-S/16 224, batch 8", False, False, 219.2, 54, 96.5, 24.1,
    bytes_step=10**10, launches_step=600, products_bytes_step=0, attention_bytes_step=0, flops_step=0,
)  # fmt: skip
LEFT_OUT = suite.TrafficRow("timm", "plain", "float32", "ViT-S/16 224, batch 8", True, False, reason="a graph breaks")
SLOWER = replace(ROW, median_us=120.0, p20_us=118.0, p80_us=122.0)


@pytest.fixture
def run(run: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `fastvit bench` where measuring takes no time: exit code, standard output, standard error."""
    monkeypatch.setattr(runner, "run_suites", lambda *_, **__: [ROW, TIMM])
    return partial(run, "bench")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write rows to a file of this name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, *rows: Row) -> Path:
        write_json_lines(rows, tmp_path / name)
        return tmp_path / name

    return write


def refuse_to_measure(*_: Any, **__: Any) -> None:
    raise AssertionError("something was measured")


def test_a_report_is_written_beside_table_and_output(run: Cli, tmp_path: Path) -> None:
    folder, output = tmp_path / "report", tmp_path / "rows.jsonl"
    code, out, _ = run("patch_embed", "--report", folder, "--output", output)
    assert code == 0 and "0.90x" in out
    assert out.splitlines()[-1] == f"Open {folder / 'report.html'} (rows: {folder / 'rows.jsonl'})"
    assert (folder / "report.html").exists() and read_json_lines(output) == [ROW, TIMM]
    code, out, err = run("patch_embed", "--json", "--report", folder)
    assert code == 0 and [json.loads(line)["provider"] for line in out.splitlines()] == ["fastvit:cpu", "timm"]
    assert err.splitlines()[-1].startswith("Open ")


def test_recorded_rows_are_reported_without_measuring(
    run: Cli, files: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "run_suites", refuse_to_measure)
    first, second = files("first.jsonl", ROW), files("second.jsonl", TIMM)
    code, out, _ = run("--rows", first, "--rows", second, "--report", tmp_path / "report")
    assert code == 0 and out.splitlines()[-1].startswith("Open ")
    assert read_json_lines(tmp_path / "report" / "rows.jsonl") == [ROW, TIMM]


def test_a_report_without_a_row_of_ours_fails_after_it_is_written(
    run: Cli, files: Callable[..., Path], tmp_path: Path
) -> None:
    missing = replace(ROW, median_us=None, ratios={}, headline=None, reason="out of tolerance")
    code, _, err = run("--rows", files("rows.jsonl", missing, TIMM), "--report", tmp_path / "report")
    assert code == 1 and "none of our rows" in err
    assert "out of tolerance" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_comparing_fails_on_a_regression_of_ours(
    run: Cli, files: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_suites", refuse_to_measure)
    before = files("before.jsonl", ROW, TIMM)
    rival = files("rival.jsonl", ROW, replace(TIMM, median_us=200.0, p20_us=199.0, p80_us=201.0))
    stopped = files("stopped.jsonl", replace(ROW, median_us=None, p20_us=None, p80_us=None, reason="no kernel"), TIMM)
    assert run("--compare", before, before)[0] == 0
    code, out, _ = run("--compare", before, rival)
    assert code == 0 and "rivals that moved" in out
    code, out, _ = run("--compare", before, files("slower.jsonl", SLOWER, TIMM))
    assert code == 1 and "+20.0%" in out and "ours: 1 slower" in out
    code, out, _ = run("--compare", before, stopped)
    assert code == 1 and "no kernel" in out
    assert run("--compare", stopped, before)[0] == 0


def test_comparing_as_json_prints_a_line_for_each_matched_row(run: Cli, files: Callable[..., Path]) -> None:
    other = replace(SLOWER, device="Some CPU, 4 threads")
    arguments = (files("before.jsonl", ROW, TIMM), files("after.jsonl", other, replace(TIMM, mode="other")))
    code, out, err = run("--compare", *arguments, "--json")
    (line,) = map(json.loads, out.splitlines())
    assert code == 1 and line["verdict"] == "slower" and line["after"]["median_us"] == 120.0
    assert err == "differs: threads: 2 before, 4 after\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--compare rows.jsonl no.jsonl", "no.jsonl: No such file"),
        ("--compare rows.jsonl corrupt.jsonl", "corrupt.jsonl, line 2: not a benchmark row"),
        ("--compare binary.jsonl rows.jsonl", "binary.jsonl: not a file of benchmark rows"),
        ("--compare rows.jsonl empty.jsonl", "empty.jsonl: there are no benchmark rows in it"),
        ("--compare rows.jsonl other.jsonl", "no case and provider is in both files"),
        ("--compare rows.jsonl", "--compare"),
        ("model --compare rows.jsonl rows.jsonl", "--compare: not accepted together with SUITES,"),
        (
            "--compare rows.jsonl rows.jsonl --report out --output x --size tiny",
            "--compare: not accepted together with --size, --output, --report,",
        ),
        ("--rows rows.jsonl --compare rows.jsonl rows.jsonl", "--compare: not accepted together with --rows,"),
        ("--rows rows.jsonl", "--rows: accepted only together with --report FOLDER"),
        ("model --threads 2 --rows rows.jsonl --report out", "--rows: not accepted together with SUITES, --threads,"),
        ("--rows no.jsonl --report out", "no.jsonl: No such file"),
        ("--rows rows.jsonl --rows corrupt.jsonl --report out", "corrupt.jsonl, line 2: not a benchmark row"),
        ("--rows empty.jsonl --report out", "empty.jsonl: there are no benchmark rows in it"),
        ("--report rows.jsonl", "--report rows.jsonl: accepted is a folder"),
        (
            "traffic --report out --size tiny",
            "traffic: not accepted together with --size, --report,",
        ),
        ("traffic model", "traffic: not accepted together with other suites"),
        ("model --host timm", "--host: accepted only with the suite traffic"),
        ("traffic --host keras", "--host keras: accepted is one of timm, torchvision, transformers vit"),
        ("traffic --way faster", "--way faster: accepted is one of eager, compiled, accelerated, accelerated compiled"),
        ("traffic --model S,XL", "--model XL: accepted is one of Ti, S, B, L"),
        ("traffic --batch 0", "--batch"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    run: Cli,
    files: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.setattr(runner, "run_suites", refuse_to_measure)
    files("rows.jsonl", ROW, TIMM)
    files("other.jsonl", replace(ROW, op="other"))
    (tmp_path / "corrupt.jsonl").write_text(ROW.to_json() + "\n{\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG")
    (tmp_path / "empty.jsonl").touch()
    there = sorted(tmp_path.iterdir())
    code, out, err = run(*arguments.split())
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(tmp_path.iterdir()) == there, "something was written"


def test_a_page_that_fails_leaves_no_half_written_file(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def full_disk(source: Path, target: Path) -> None:
        if target.suffix == ".html":
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    code, _, err = run("patch_embed", "--report", tmp_path / "report")
    assert code == 2 and "disk full" in err
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".jsonl", ".png"}


def test_traffic_prints_tables_or_lines_and_writes_them(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[suite.Case] = []

    def count(plan: list[suite.Case], progress: Any = None) -> list[suite.TrafficRow]:
        asked[:] = plan
        return [COUNTED, LEFT_OUT]

    monkeypatch.setattr(suite, "run", count)
    common = ("traffic", "--host", "timm,torchvision", "--setting", "plain", "--way", "eager", "--batch", "8")
    code, out, _ = run(*common, "--stream", "float32", "--bandwidth", "2", "--rate", "1", "--output", tmp_path / "rows")
    assert code == 0 and "219.2 (54)" in out and "2 TB/s, 1 TFLOP/s" in out and "left out: timm" in out
    assert "counted" in out.lower() and "5.00 ms" in out, "10 GB at 2 TB/s"
    assert [(case.host, case.model, case.batch) for case in asked] == [("timm", "S", 8), ("torchvision", "S", 8)]
    assert suite.read_json_lines(tmp_path / "rows") == [COUNTED, LEFT_OUT]
    code, out, _ = run(*common, "--json")
    assert code == 0 and [json.loads(line)["bytes_step"] for line in out.splitlines()] == [10**10, None]
    monkeypatch.setattr(suite, "run", lambda *_: [LEFT_OUT])
    assert run(*common)[0] == 1
