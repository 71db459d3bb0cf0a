"""The campaign where there is no GPU: it says so, and what follows, ends and sums up its stages works anywhere."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
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
from fastvit.benchmarks.problem import NO_COMPILE

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
        "build", "warm", "tests", "primitives", "limits", "validate_triton", "validate_cuda", "sanitize",
        "ceilings", "patch_embed", "model", "launch", "add_position", "tune", "profile",
        "compiled", "input", "accelerated", "accelerated_model", "masked",
    ]  # fmt: skip
    assert sum(stage.share for stage in STAGES) == runner.BUDGET
    assert runner.BUDGET + 2 * runner.GRACE < 9 * 60 - 15, "installation and start-up take their time too"
    assert all(stage.share >= 12 for stage in STAGES), "starting and loading take half of that"


def test_what_is_right_and_what_is_fast_fit_into_five_and_six_minutes() -> None:
    """With time to spare, so that each stage has more than its share."""
    right = find_stages(STAGES, ["warm,tests,primitives,limits,validate_*,sanitize"])
    fast = find_stages(STAGES, ["warm,ceilings,patch_embed,model,launch,add_position,tune,profile"])
    assert len(right) == 7 and sum(stage.share for stage in right) * 1.4 < 270
    assert len(fast) == 8 and sum(stage.share for stage in fast) * 1.4 < 365


def test_only_suites_do_without_compiled_rivals() -> None:
    suites = {"patch_embed", "model", "add_position", "input", "accelerated", "accelerated_model", "masked"}
    assert {stage.name for stage in STAGES if stage.environment == {NO_COMPILE: "1"}} == suites
    assert all(not stage.environment for stage in STAGES if stage.name not in suites)


def test_stages_are_chosen_by_name_and_keep_their_order() -> None:
    def chosen(*wanted: str) -> list[str]:
        return [stage.name for stage in find_stages(STAGES, wanted)]

    assert [stage.name for stage in find_stages(STAGES, None)] == NAMES
    assert chosen("profile, warm") == ["warm", "profile"] == chosen("profile", "warm,warm")
    assert chosen("validate_*,model") == ["validate_triton", "validate_cuda", "model"]
    with pytest.raises(ValueError, match="--stage speed: known are build, warm, tests"):
        chosen("warm,speed")
    with pytest.raises(ValueError, match="empty"):
        chosen(",")


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--stage", "speed"])
    assert stopped.value.code == 2 and "--stage speed: known are build" in capsys.readouterr().err


def test_a_backend_that_is_left_out_must_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTVIT_WITHOUT", "triton,tpu")
    with pytest.raises(SystemExit) as stopped:
        main(["--dry-run"])
    assert stopped.value.code == 2 and "FASTVIT_WITHOUT: unknown backend 'tpu'" in capsys.readouterr().err


def test_the_help_names_what_the_environment_can_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("FASTVIT_WITHOUT", "FASTVIT_NO_COMPILE", "FASTVIT_COMMIT"))


def test_make_passes_stage_and_budget_on() -> None:
    # These tests may themselves be run by make, which would say so in between.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for arguments, expected in (
        ([], "campaign"),
        (["STAGE=model,validate_*"], "campaign --stage 'model,validate_*'"),
        (["STAGE=warm", "BUDGET=270"], "campaign --stage 'warm' --budget 270"),
    ):
        command = ["make", "--no-print-directory", "-n", "gpu", *arguments]
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


def test_no_stage_starts_when_the_budget_is_spent(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake({"long": "import time; time.sleep(9)", "late": "print(1)", "later": "print(1)"}, budget=1.2) == 1
    assert [result.status for result in _results(tmp_path).values()] == ["cut off", "no time left", "no time left"]
    assert capsys.readouterr().out.splitlines()[-2] == "Not run, since 1 s were too few: late, later"
    assert fake({"good": ""}) == 0 and "Not run" not in capsys.readouterr().out


def test_nobody_takes_the_share_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage leaves unspent, the next ones may use; one that hangs takes nothing from the others."""
    now: list[float] = [100.0]
    left: dict[str, float] = {}
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    durations = {"quick": 1.0, "hangs": 1e9, "next": 1e9}
    stages = [Stage(name, share, "", lambda out: PASSED) for name, share in zip(durations, (10, 20, 30), strict=True)]

    def run(stage: Stage, out: Path, seconds: float, log: object) -> Result:
        left[stage.name] = seconds
        now[0] += min(durations[stage.name], seconds)
        return Result(stage.name, PASSED, 0.0)

    monkeypatch.setattr(runner, "run_stage", run)
    monkeypatch.setattr(runner, "Log", lambda *_: lambda *_, **__: None)
    monkeypatch.setattr(runner, "Lines", lambda *_: type("Nowhere", (), {"write": lambda *_: None})())
    monkeypatch.setattr(runner, "FILES", ())
    assert campaign(stages, Path(), 120.0, {}, started=95.0) == 0
    assert left == {"quick": 15.0, "hangs": 54.0, "next": 60.0}
    # A budget below all shares: the first stages have theirs, the last what is left, if that is worth a start.
    for budget, last in ((50.0, 20.0), (45.0, None)):
        now[0], left = 100.0, {}
        assert campaign(stages, Path(), budget, {}, started=100.0) == int(last is None)
        assert left == {"quick": 10.0, "hangs": 29.0, **({"next": last} if last else {})}


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
    asked: list[int] = []
    monkeypatch.setattr(runner.os, "killpg", lambda group, signal: killed.append(group))
    monkeypatch.setattr(runner.os, "kill", lambda process, signal: asked.append(signal))
    listener = runner.Listener("stuck", lambda *_: None)  # type: ignore[arg-type]
    assert runner._follow(Stuck(), listener, 0.1) == "cut off"  # type: ignore[arg-type]
    assert killed == [0] and asked == [signal.SIGUSR1]


def test_a_stage_that_hangs_says_where(fake: Fake, tmp_path: Path) -> None:
    hangs = "def wait_for_the_gpu():\n print('case 3', flush=True); time.sleep(60)\nwait_for_the_gpu()"
    ready = "import faulthandler, signal, time\nfaulthandler.register(signal.SIGUSR1, file=2)\n"
    assert fake({"hangs": ready + hangs}, budget=2.0) == 1
    (result,) = _results(tmp_path).values()
    assert (result.status, result.figure) == ("cut off", "case 3"), "its own words, not those of the dump"
    assert any("in wait_for_the_gpu" in str(row.get("text")) for row in _lines(tmp_path / "log.jsonl"))


def test_every_stage_is_ready_to_say_where_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def ask(out: Path) -> str:
        os.kill(os.getpid(), signal.SIGUSR1)
        return PASSED

    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # rather than to be ended by it
    try:
        assert runner.end_inside(Stage("any", 1, "", ask), tmp_path) == 0
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)
    assert re.search(r"most recent call first.*\n.* in ask", capfd.readouterr().err)


def test_a_stage_has_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, code = subprocess.Popen, "import os; print(os.environ.get('FASTVIT_NO_COMPILE'), os.environ['HOME'])"
    monkeypatch.setattr(runner.subprocess, "Popen", lambda _, **how: real([sys.executable, "-c", code], **how))
    monkeypatch.setenv("HOME", "/here")
    monkeypatch.delenv(NO_COMPILE, raising=False)
    for environment in ({}, {NO_COMPILE: "1"}):
        stage = Stage("any", 1, "", lambda out: PASSED, environment)
        runner.run_stage(stage, tmp_path, 20.0, runner.Log(tmp_path / "log.jsonl", 0.0))
    assert [row["text"] for row in _lines(tmp_path / "log.jsonl")] == ["None /here", "1 /here"]


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
