"""The campaign where there is no GPU: it says so, and what follows, ends and sums up its stages works anywhere."""

from __future__ import annotations

import faulthandler
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit.benchmarks.campaign import __main__ as command_line
from fastvit.benchmarks.campaign import runner
from fastvit.benchmarks.campaign.__main__ import main
from fastvit.benchmarks.campaign.output import FILES, MARK
from fastvit.benchmarks.campaign.runner import Result, Stage, campaign, find_stages
from fastvit.benchmarks.campaign.stages import CALLS, STAGES
from fastvit.benchmarks.problem import NO_COMPILE
from fastvit.benchmarks.rows import read_json_lines
from fastvit.benchmarks.runner import SUITES
from fastvit.validation.report import FAILED, PASSED, SKIPPED
from tests.benchmarks.stage_results import rows_in

NAMES = [stage.name for stage in STAGES]
SAY = f"import json; report = lambda **values: print('{MARK}' + json.dumps(values)); "  # without loading torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--call", "A"], ["--stage", "model"]])
def test_without_a_gpu_it_exits_with_1_and_says_why(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "no CUDA device" in printed.err and "--dry-run" in printed.err and not out.exists()


Asked = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the command line asks the campaign for, where there is a GPU; the campaign does not run."""
    found: Asked = {}

    def note(stages: list[Stage], out: Path, budget: float, about: Asked, started: float, *, dry: bool) -> int:
        found.update(out=out, names=[stage.name for stage in stages], budget=budget, about=about, dry=dry)
        found["shares"] = sum(stage.share for stage in stages)
        return 0

    monkeypatch.setattr(command_line, "campaign", note)
    monkeypatch.setattr(command_line, "circumstances", lambda device: {"device": device.type, "commit": ""})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return found


def test_a_call_has_its_stages_and_all_of_them_fit_into_its_budget(asked: Asked) -> None:
    first = ["build", "warm"]
    expected = {
        "A": [*first, "primitives", "validate_triton", "validate_cuda", "ceilings", "patch_embed", "sweep"],
        "B": [
            *first, "tests", "limits_triton", "limits_cuda", "patch_embed", "model", "launch", "add_position", "tune",
            "profile", "compiled", "sanitize",
        ],
    }  # fmt: skip
    for call, names in expected.items():
        assert main(["--call", call]) == 0
        assert asked["names"] == names and asked["about"]["device"] == "cuda" and not asked["dry"]
        assert asked["shares"] == asked["budget"] == CALLS[call]
    assert CALLS["A"] <= 270 and CALLS["B"] <= 412, "with two starts of a machine they fit into a quarter of an hour"
    assert all(stage.share >= 10 for stage in STAGES), "starting and loading take half of that"
    assert main(["--call", "A", "--budget", "99.5"]) == 0 and asked["budget"] == 99.5
    assert main([]) == 0 and asked["names"] == NAMES and asked["budget"] == asked["shares"]


def test_a_copy_without_its_history_is_told_of(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stage", "warm"]) == 0 and "FASTVIT_COMMIT is not set" in capsys.readouterr().out


def test_a_dry_run_is_on_the_cpu_whatever_is_there(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert main(["--stage", "warm"]) == 0 and asked["out"] == Path("out/gpu").resolve()
    assert main(["--dry-run", "--stage", "build,masked"]) == 0
    assert asked["dry"] and asked["about"]["device"] == "cpu" and asked["budget"] == asked["shares"] > 200
    assert asked["out"] == Path("out/dry").resolve(), "what a GPU has measured is not replaced"


def test_every_stage_has_what_it_takes_to_run_dry() -> None:
    """Arguments that its function has, by which nothing is asked of a GPU."""
    for stage in STAGES:
        given = inspect.signature(stage.run).bind(Path("out"), **stage.dry).arguments
        assert given.get("device", "cpu") == "cpu", stage.name
        assert stage.dry and ("device" in given or stage.name in ("build", "warm", "tests")), stage.name
        assert set(stage.calls) <= set(CALLS)
    on_gpu = {name for name, plan in SUITES.items() if plan("tiny", torch.device("cuda"))}
    assert {stage.name for stage in STAGES if NO_COMPILE in stage.environment} == on_gpu


def test_stages_are_chosen_by_name_and_keep_their_order() -> None:
    def chosen(*wanted: str) -> list[str]:
        return [stage.name for stage in find_stages(STAGES, wanted)]

    assert [stage.name for stage in find_stages(STAGES, None)] == NAMES
    assert chosen("profile, warm") == ["warm", "profile"] == chosen("profile", "warm,warm")
    assert chosen("validate_*,model") == ["validate_triton", "validate_cuda", "model"]
    with pytest.raises(ValueError, match="empty"):
        chosen(",")


@pytest.mark.parametrize(
    ("arguments", "without", "code", "words"),
    [
        (["--stage", "warm,speed"], "", 2, ["--stage speed: known are build, warm, primitives"]),
        (["--call", "C"], "", 2, ["--call", "'C'", "'A', 'B'"]),
        (["--call", "A", "--stage", "warm"], "", 2, ["not allowed with"]),
        (["--budget", "0"], "", 2, ["--budget 0: expected seconds, more than 0"]),
        (["--dry-run"], "triton,tpu", 2, ["FASTVIT_WITHOUT: unknown backend 'tpu'"]),
        (["--help"], "", 0, ["FASTVIT_WITHOUT", "FASTVIT_NO_COMPILE", "FASTVIT_COMMIT", "  sweep    ", "A of 270 s"]),
    ],
)
def test_what_is_wrong_and_what_can_be_said_is_told(
    arguments: list[str], without: str, code: int, words: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FASTVIT_WITHOUT", without)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = "".join(capsys.readouterr())
    assert stopped.value.code == code and all(word in printed for word in words)


def test_make_passes_on_what_it_is_given() -> None:
    # These tests may themselves be run by make, which would say so in between.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for arguments, python, expected in (
        ([], "build/gpu-env/bin", ""),
        (["CALL=A"], "build/gpu-env/bin", "--call 'A'"),
        (["STAGE=model,validate_*", "BUDGET=270"], "build/gpu-env/bin", "--stage 'model,validate_*' --budget 270"),
        (["DRY=1", "STAGE=warm"], ".venv/bin", "--stage 'warm' --dry-run"),
    ):
        command = ["make", "--no-print-directory", "-n", "gpu", *arguments]
        root = Path(__file__).parents[2]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        *before, last = run.stdout.splitlines()
        assert " ".join(last.split()).endswith(f"{python}/python -m fastvit.benchmarks.campaign {expected}".strip())
        assert bool(before) == ("DRY=1" not in arguments), "no environment is made"


Fake = Callable[..., int]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Run the campaign with each stage replaced by a program; shares and budget are seconds."""
    real = subprocess.Popen

    def run(
        programs: dict[str, str], budget: float = 60.0, environment: dict[str, str] | None = None, dry: bool = False
    ) -> int:
        def start(command: list[str], **arguments: object) -> object:
            name = command[command.index("--inside") + 1]
            assert command[command.index("--out") + 1] == str(tmp_path) and ("--dry-run" in command) == dry
            return real([sys.executable, "-u", "-c", programs[name]], **arguments)  # type: ignore[call-overload]

        stages = [Stage(name, 1, "", lambda out: PASSED, environment=environment or {}) for name in programs]
        with monkeypatch.context() as patched:
            patched.setattr(runner.subprocess, "Popen", start)
            return campaign(stages, tmp_path, budget, {"device": "none"}, dry=dry)

    return run


def _results(out: Path) -> dict[str, Result]:
    return {row["stage"]: Result(**row) for row in rows_in(out / "summary.jsonl")[1:]}


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
    assert {name: (result.status, result.figure) for name, result in _results(tmp_path).items()} == {
        "good": ("passed", "7 of 7"), "silent": ("passed", ""), "bad": ("failed", "1 of 2; ValueError: no such thing"),
        "wrong": ("failed", "1 failed"), "slow": ("cut off", "3 so far"), "skip": ("skipped", "no such tool"),
        "last": ("failed", "ended by signal 11"),
    }  # fmt: skip
    log = rows_in(tmp_path / "log.jsonl")
    printed = capsys.readouterr().out
    assert {"hello", "begun", "still here"} <= {row.get("text") for row in log}
    assert "[good] hello" in printed and MARK not in printed
    assert [row for row in log if row.get("extra") == [1] and row["stage"] == "good"]
    *table, where = printed.splitlines()[-8:]
    assert [line.split()[0] for line in table] == list(programs) and str(tmp_path) in where
    assert "skipped" in table[5] and table[5].endswith("no such tool")
    assert {path.name for path in tmp_path.iterdir()} <= set(FILES)


def test_no_stage_starts_when_the_budget_is_spent(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake({"long": "import time; time.sleep(9)", "late": "print(1)", "later": "print(1)"}, budget=1.2) == 1
    assert [result.status for result in _results(tmp_path).values()] == ["cut off", "no time left", "no time left"]
    assert capsys.readouterr().out.splitlines()[-2] == "Not run, since 1 s were too few: late, later"
    assert fake({"good": "", "skip": "raise SystemExit(77)"}) == 0, "a skipped stage is no failure"
    assert "Not run" not in capsys.readouterr().out


def test_nobody_takes_the_share_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage leaves unspent, the next ones may use; one that hangs takes nothing from the others."""
    now: list[float] = [100.0]
    left: dict[str, float] = {}
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    durations = {"quick": 1.0, "hangs": 1e9, "next": 1e9}
    stages = [Stage(name, share, "", lambda out: PASSED) for name, share in zip(durations, (10, 20, 30), strict=True)]

    def run(stage: Stage, out: Path, seconds: float, log: object, dry: bool) -> Result:
        left[stage.name] = seconds
        now[0] += min(durations[stage.name], seconds)
        return Result(stage.name, PASSED, 0.0)

    monkeypatch.setattr(runner, "run_stage", run)
    assert campaign(stages, tmp_path, 120.0, {}, started=95.0) == 0
    assert left == {"quick": 15.0, "hangs": 54.0, "next": 60.0}
    # A budget below all shares: the first stages have theirs, the last what is left, if that is worth a start.
    for budget, last in ((50.0, 20.0), (45.0, None)):
        now[0], left = 100.0, {}
        assert campaign(stages, tmp_path, budget, {}, started=100.0) == int(last is None)
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
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)']"
    programs = {
        "bytes": f"import os; os.write(1, b'caf\\xe9 \\xff\\n{MARK}{{broken\\n{MARK}[1]\\nno end of line')",
        "child": f"{child})",
        "orphan": f"{child}, start_new_session=True)",
        "after": "print('after')",
    }
    started = time.monotonic()
    monkeypatch.setattr(runner, "GRACE", 1.0)
    assert fake(programs) == 0
    assert time.monotonic() - started < 15
    texts = [str(row.get("text")) for row in rows_in(tmp_path / "log.jsonl")]
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
    assert any("in wait_for_the_gpu" in str(row.get("text")) for row in rows_in(tmp_path / "log.jsonl"))


def test_every_stage_is_ready_to_say_where_it_is_and_ends_by_its_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def ask(out: Path) -> str:
        os.kill(os.getpid(), signal.SIGUSR1)
        return status

    codes: dict[str, int] = {}
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # rather than to be ended by it
    try:
        for status in (PASSED, FAILED, SKIPPED):
            codes[status] = runner.end_inside(Stage("any", 1, "", ask), tmp_path)
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)
    assert codes == {PASSED: 0, FAILED: 3, SKIPPED: 77}
    assert re.search(r"most recent call first.*\n.* in ask", capfd.readouterr().err)


def test_a_stage_has_its_environment(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/here")
    code = "import os; print(*map(os.environ.get, ('FASTVIT_NO_COMPILE', 'HOME', 'TRITON_INTERPRET')))"
    for dry, words in ((False, "1 /here None"), (True, "1 /here 1")):
        monkeypatch.setenv("TRITON_INTERPRET", "0" if dry else "1")
        assert fake({"any": code}, environment={NO_COMPILE: "1"}, dry=dry) == 0
        assert words in {row["text"] for row in rows_in(tmp_path / "log.jsonl")}


def test_a_stage_is_a_process_of_this_package(tmp_path: Path) -> None:
    """Not replaced by a fake: a stage that fails says why, without a GPU or with one."""
    log = runner.Log(tmp_path / "log.jsonl", time.monotonic())
    stage = Stage("speed", 1, "", lambda out: PASSED)
    result = runner.run_stage(stage, tmp_path, 100.0, log)
    assert result.status == "failed" and "--stage speed: known are build" in result.figure
    # Dry, it has the arguments that let it be over soon.
    (stage,) = find_stages(STAGES, ["ceilings"])
    assert runner.run_stage(stage, tmp_path, 100.0, log, dry=True).status == "passed"
    rows = read_json_lines(tmp_path / "bench.jsonl")
    assert len(rows) == 4 and all("threads" in row.device and row.flops < 1e6 for row in rows)
