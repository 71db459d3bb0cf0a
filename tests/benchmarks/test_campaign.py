"""The campaign where there is no GPU: it says so, and what follows, ends and sums up its stages works anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvit.benchmarks.campaign import runner
from fastvit.benchmarks.campaign.__main__ import main
from fastvit.benchmarks.campaign.output import FAILED, FILES, MARK, PASSED, SKIPPED, report, understood
from fastvit.benchmarks.campaign.runner import Result, Stage, campaign, find_stages, format_results
from fastvit.benchmarks.campaign.stages import STAGES

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
NAMES = [stage.name for stage in STAGES]
SAY = f"import json; report = lambda **values: print('{MARK}' + json.dumps(values)); "  # without loading torch


@without_gpu
@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--stage", "model"]])
def test_without_a_gpu_it_exits_with_1_and_says_why(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "no CUDA device" in printed.err and not out.exists()
    planned = [line.split(" ")[0] for line in printed.out.splitlines()]
    assert planned == (NAMES if "--dry-run" in arguments else [])


@without_gpu
def test_as_a_command_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastvit.benchmarks.campaign", "--dry-run"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1 and "no CUDA device" in run.stderr and "warm (" in run.stdout


def test_what_matters_most_comes_first_and_all_fits_into_nine_minutes() -> None:
    assert NAMES == [
        "build", "warm", "tests", "primitives", "limits", "validate", "sanitize", "ceilings", "patch_embed", "model",
        "launch", "masked", "add_position", "input", "tune", "profile", "accelerated", "accelerated_model",
    ]  # fmt: skip
    assert sum(stage.share for stage in STAGES) == runner.BUDGET
    assert runner.BUDGET + 2 * runner.GRACE < 9 * 60 - 15, "installation and start-up take their time too"
    assert all(stage.share > runner.LEAST for stage in STAGES)


def test_stages_are_chosen_by_name_and_keep_their_order() -> None:
    def chosen(*wanted: str) -> list[str]:
        return [stage.name for stage in find_stages(STAGES, wanted)]

    assert [stage.name for stage in find_stages(STAGES, None)] == NAMES
    assert chosen("profile, warm") == ["warm", "profile"] == chosen("profile", "warm,warm")
    with pytest.raises(ValueError, match="--stage speed: known are build, warm, tests"):
        chosen("warm,speed")
    with pytest.raises(ValueError, match="empty"):
        chosen(",")


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--stage", "speed"])
    assert stopped.value.code == 2 and "--stage speed: known are build" in capsys.readouterr().err


def test_make_passes_the_stage_on() -> None:
    # These tests may themselves be run by make, which would say so in between.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for stage, expected in (("", "campaign"), ("model,tune", "campaign --stage model,tune")):
        command = ["make", "--no-print-directory", "-n", "gpu", f"STAGE={stage}"]
        root = Path(__file__).parents[2]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.rstrip().endswith(expected)


Fake = Callable[..., int]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Run the campaign with each stage replaced by a program; shares and budget are seconds."""
    real = subprocess.Popen

    def run(programs: dict[str, str], budget: float = 60.0, out: Path = tmp_path) -> int:
        def start(command: list[str], **arguments: object) -> object:
            name = command[command.index("--inside") + 1]
            assert command[command.index("--out") + 1] == str(out)
            return real([sys.executable, "-u", "-c", programs[name]], **arguments)  # type: ignore[call-overload]

        monkeypatch.setattr(runner.subprocess, "Popen", start)
        monkeypatch.setattr(runner, "LEAST", 0.5)
        stages = [Stage(name, 1, "", lambda out: PASSED) for name in programs]
        try:
            return campaign(stages, out, budget, {"device": "none"})
        finally:
            monkeypatch.setattr(runner.subprocess, "Popen", real)

    return run


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _results(out: Path) -> dict[str, Result]:
    return {str(row["stage"]): Result(**row) for row in _lines(out / "summary.jsonl")[1:]}  # type: ignore[arg-type]


def test_stages_are_followed_cut_off_and_summed_up(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    programs = {
        "good": SAY + "print('hello'); report(figure='7 of 7', extra=[1])",
        "silent": "",
        "bad": SAY + "report(figure='1 of 2'); raise ValueError('no such thing')",
        "wrong": SAY + "report(figure='1 failed'); print('the end'); raise SystemExit(3)",
        "slow": SAY + "import time; report(figure='3 so far'); print('begun'); time.sleep(60)",
        "skip": SAY + "report(figure='no such tool'); raise SystemExit(77)",
        "last": "import os, signal; print('still here'); os.kill(os.getpid(), signal.SIGSEGV)",
    }
    assert fake(programs, budget=12.0) == 1
    assert time.monotonic() - started < 30
    found = _results(tmp_path)
    assert {name: result.status for name, result in found.items()} == {
        "good": "passed", "silent": "passed", "bad": "failed", "wrong": "failed", "slow": "cut off",
        "skip": "skipped", "last": "failed",
    }  # fmt: skip
    figures = {name: result.figure for name, result in found.items()}
    assert figures == {
        "good": "7 of 7", "silent": "", "bad": "1 of 2; ValueError: no such thing", "wrong": "1 failed",
        "slow": "3 so far", "skip": "no such tool", "last": "ended by signal 11",
    }  # fmt: skip
    log = _lines(tmp_path / "log.jsonl")
    printed = capsys.readouterr().out
    assert {"hello", "begun", "still here"} <= {row.get("text") for row in log}
    assert "[good] hello" in printed and MARK not in printed
    assert [row for row in log if row.get("extra") == [1] and row["stage"] == "good"]
    *table, where = printed.splitlines()[-8:]
    assert [line.split()[0] for line in table] == list(programs) and str(tmp_path) in where
    assert "skipped" in table[5] and table[5].endswith("no such tool")
    assert {path.name for path in tmp_path.iterdir()} <= set(FILES)


def test_a_skipped_stage_is_no_failure(fake: Fake) -> None:
    assert fake({"good": "", "skip": "raise SystemExit(77)"}) == 0
    assert fake({"bad": "raise SystemExit(2)"}) == 1


def test_no_stage_starts_when_the_budget_is_spent(fake: Fake, tmp_path: Path) -> None:
    assert fake({"late": "print(1)"}, budget=0.1) == 1
    assert _results(tmp_path)["late"].status == "no time left"


def test_nobody_takes_the_share_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage leaves unspent, the next ones may use; one that hangs takes nothing from the others."""
    now, left = [100.0], {}
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    durations = {"quick": 1.0, "hangs": 1e9, "next": 1e9}

    def run(stage: Stage, out: Path, seconds: float, log: object) -> Result:
        left[stage.name] = seconds
        now[0] += min(durations[stage.name], seconds)
        return Result(stage.name, PASSED, 0.0)

    monkeypatch.setattr(runner, "run_stage", run)
    monkeypatch.setattr(runner, "Log", lambda *_: lambda *_, **__: None)
    monkeypatch.setattr(runner, "Lines", lambda *_: type("Nowhere", (), {"write": lambda *_: None})())
    monkeypatch.setattr(runner, "FILES", ())
    stages = [Stage(name, share, "", lambda out: PASSED) for name, share in zip(durations, (10, 20, 30), strict=True)]
    assert campaign(stages, Path(), 120.0, {}, started=95.0) == 0
    assert left == {"quick": 15.0, "hangs": 54.0, "next": 60.0}


def test_files_of_an_earlier_campaign_are_replaced_and_others_left_alone(fake: Fake, tmp_path: Path) -> None:
    for name in (*FILES, "notes.txt"):
        (tmp_path / name).write_text("old\n")
    assert fake({"good": "print('new')"}) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "summary.jsonl", "notes.txt"}
    assert "old" not in (tmp_path / "log.jsonl").read_text()
    assert len(FILES) == len(set(FILES)) == 8


def test_what_is_no_text_and_what_outlives_its_stage_do_no_harm(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no UTF-8, a broken message, children that hold the pipe or even leave the session."""
    programs = {
        "bytes": f"import os; os.write(1, b'caf\\xe9 \\xff\\n{MARK}{{broken\\n{MARK}[1]\\nno end of line')",
        "child": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
        "orphan": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'],"
        " start_new_session=True)",
        "after": "print('after')",
    }
    started = time.monotonic()
    monkeypatch.setattr(runner, "GRACE", 1.0)
    assert fake(programs) == 0
    assert time.monotonic() - started < 15
    texts = [str(row.get("text")) for row in _lines(tmp_path / "log.jsonl")]
    assert "caf\ufffd \ufffd" in texts and "no end of line" in texts and "after" in texts


def test_a_process_that_can_not_be_killed_does_not_stop_the_campaign(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        pid, returncode = 0, None
        stdout = iter([])

        def wait(self, seconds: float) -> int:
            raise subprocess.TimeoutExpired("stuck", seconds)

    killed: list[int] = []
    monkeypatch.setattr(runner.os, "killpg", lambda group, signal: killed.append(group))
    listener = runner.Listener("stuck", lambda *_: None)  # type: ignore[arg-type]
    assert runner._follow(Stuck(), listener, 0.1) == "cut off"  # type: ignore[arg-type]
    assert killed == [0]


def test_a_stage_is_a_process_of_this_package(tmp_path: Path) -> None:
    """Not replaced by a fake: a stage that fails says why, without a GPU or with one."""
    log = runner.Log(tmp_path / "log.jsonl", time.monotonic())
    stage = Stage("speed", 1, "", lambda out: PASSED)
    result = runner.run_stage(stage, tmp_path, 100.0, log)
    assert result.status == "failed" and "--stage speed: known are build" in result.figure


def test_statuses_are_exit_codes(tmp_path: Path) -> None:
    for status, code in ((PASSED, 0), (FAILED, 3), (SKIPPED, 77)):
        assert runner.end_inside(Stage("any", 1, "", lambda out, status=status: status), tmp_path) == code


def test_messages_are_told_from_text(capsys: pytest.CaptureFixture[str]) -> None:
    print("no end of line", end="")
    threading.Thread(target=report, kwargs={"figure": "µ"}).run()
    _, message = capsys.readouterr().out.splitlines()
    assert understood(message) == {"figure": "µ"}
    assert understood("figure") is None and understood(MARK + "{") is None and understood(MARK + "3") is None


def test_the_table_is_short_and_aligned() -> None:
    table = format_results([Result("a", "passed", 1.0, "x"), Result("longer", "no time left", 100.0)])
    assert table == "a       passed           1.0 s  x\nlonger  no time left   100.0 s"
    assert format_results([]) == ""
