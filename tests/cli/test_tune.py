"""`fastvit tune`, and the line of `fastvit info` about tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastvit import tuning
from fastvit.benchmarks import timing, tune
from fastvit.tuning import FORWARD, Choice, Problem, Table

Cli = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
OTHER = Problem("patch_embed", FORWARD, torch.uint8, torch.float32, torch.float32, (7, 3, 2, 2), False)


@pytest.fixture
def run(run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    """Run a command in this process, with a cache of its own: exit code, standard output, standard error."""
    monkeypatch.delenv("FASTVIT_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "scope_of", lambda device, quick: tune.Scope((1,), ("float32",), 0.01))
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)

    def call(*arguments: str) -> tuple[int, str, str]:
        tuning.reset()
        return run(*arguments)

    yield call
    tuning.reset()


@pytest.fixture(autouse=True)
def _two_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies and one that does not, whatever else there is."""
    monkeypatch.setattr(tune, "TUNED", {name: tune.TUNED[name] for name in ("patch_embed", "add_position")})


def test_it_explains_itself(run: Cli) -> None:
    code, out, _ = run("tune", "--help")
    assert code == 0 and "Examples" in out and "fastvit tune --quick" in out and "--show" in out
    assert "tune" in run("--help")[1]


def test_it_measures_writes_and_shows(run: Cli, tmp_path: Path) -> None:
    code, out, _ = run("tune", "--show", "--device", "cpu")
    assert code == 0 and out == "cpu: none\n"
    code, out, _ = run("tune", "--quick", "--device", "cpu", "--model", "Ti")
    assert code == 0
    path = tuning.default_path(CPU)
    assert path.is_relative_to(tmp_path) and out.splitlines()[-1].startswith(f"Wrote {path}: tuning table of ")
    for text in ("choice", "PyTorch", "ratio", "192x3x16x16"):
        assert text in out
    table = Table.load(path)
    assert {p.op for p in table.choices} == {"patch_embed", "add_position"}
    code, out, _ = run("tune", "--show", "--device", "cpu")
    assert code == 0 and "192x3x16x16" in out and out.splitlines()[-1] == f"cpu: {path}"
    code, out, _ = run("tune", "--show", "--json", "--device", "cpu")
    assert code == 0 and Table.from_json(json.dumps(json.loads(out)["cpu"])) == table


def test_json_and_output(run: Cli, tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.json"
    code, out, err = run("tune", "--device", "cpu", "--model", "Ti", "--json", "--output", str(path))
    assert code == 0 and Table.from_json(out) == Table.load(path)
    assert f"Wrote {path}" in err and not tuning.default_path(CPU).exists()


def test_earlier_measurements_stay(run: Cli) -> None:
    path = tuning.default_path(CPU)
    choice = Choice("reference", {"reference": 1.0})
    for device, kept in ((tuning.device_name(CPU), True), ("another", False)):
        Table(device, tuning.current_versions(), {OTHER: {8: choice}}).save(path)
        assert run("tune", "--device", "cpu", "--model", "Ti")[0] == 0
        table = Table.load(path)
        assert (OTHER in table.choices) == kept and len(table.choices) == 4 + kept
        assert table.mismatch(CPU) == ""


def test_the_file_is_that_of_the_threads(run: Cli) -> None:
    threads = torch.get_num_threads()
    code, out, _ = run("tune", "--device", "cpu", "--model", "Ti", "--threads", str(threads + 1))
    assert code == 0 and f"{threads + 1}-threads.json" in out and torch.get_num_threads() == threads
    assert run("tune", "--show", "--device", "cpu")[1] == "cpu: none\n"


def test_reasons_are_printed(run: Cli) -> None:
    from fastvit.validation.faults import planted

    with planted("bias dropped"):
        code, out, _ = run("tune", "--device", "cpu", "--model", "Ti")
    assert code == 0 and "patch_embed forward, 192x3x16x16, 256 rows, cpu: not timed, out of tolerance" in out


def test_it_says_when_no_table_will_be_used(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_TUNING", "off")
    code, out, _ = run("tune", "--device", "cpu", "--model", "Ti")
    assert code == 0 and out.splitlines()[-1] == "FASTVIT_TUNING=off: no table is used"
    assert run("tune", "--show", "--device", "cpu")[1] == "cpu: off (FASTVIT_TUNING=off)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model XL", "--model XL: accepted is one of Ti, S, B, L"),
        ("--model S,B,Q", "--model Q: accepted is one of Ti, S, B, L"),
        ("--device tpu", "--device tpu: accepted is one of auto, cpu"),
        ("--device cuda:99", "--device cuda:99: accepted is"),
        ("--threads 0", "--threads"),
        ("--output {here}", "--output {here}: accepted is a file that can be written"),
        ("--output {here}/file/table.json", "accepted is a file that can be written"),
        ("--output /proc/no/table.json", "--output /proc/no/table.json: accepted is a file that can be written"),
        ("--fast", "--fast"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(tune, "tune", None)
    code, _, err = run("tune", *arguments.format(here=tmp_path).split())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message.format(here=tmp_path) in err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_info_says_which_table_is_in_force(run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "tuning table, cpu: none\n" in run("info")[1]
    path = tuning.default_path(CPU)
    Table(tuning.device_name(CPU), tuning.current_versions()).save(path)
    assert f"tuning table, cpu: {path}\n" in run("info")[1]
    assert json.loads(run("info", "--json")[1])["tuning"]["cpu"] == str(path)
    Table("another", tuning.current_versions()).save(path)
    assert f"tuning table, cpu: none (ignored: {path}: its device is another, here " in run("info")[1]
    monkeypatch.setenv("FASTVIT_TUNING", "0")
    assert "tuning table, cpu: off (FASTVIT_TUNING=0)\n" in run("info")[1]
