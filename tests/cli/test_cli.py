"""The command line: help, tables and JSON, exit codes, one-line errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastvit
from fastvit.demo import environment
from fastvit.training import TrainOptions
from fastvit.training import digits as digits_module
from fastvit.training import models as models_module

Cli = Callable[..., tuple[int, str, str]]

COMMANDS = ("info", "validate", "bench", "tune", "train", "accelerate", "demo", "inspect", "convert")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Cli, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Examples" in out and f"fastvit {command}" in out and "--help" in out


def test_help_names_every_command_and_version_is_the_packages(run: Cli) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    assert run("--version")[:2] == (0, f"fastvit {fastvit.__version__}\n")


def test_every_option_of_a_run_is_one_of_train() -> None:
    from fastvit.cli.train import train

    options = {field.name for field in dataclasses.fields(TrainOptions)}
    assert set(inspect.signature(train).parameters) - {"resume"} == options


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastvit.cli", "info", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["fastvit"] == fastvit.__version__


def test_info_says_what_is_here_and_why_not(run: Cli) -> None:
    code, out, _ = run("info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] and found["versions"]["python"]
    assert found["backends"]["cpu"]["cpu"] == "" and found["backends"]["cpu"]["cuda"] != ""
    assert "sm_80, sm_90, sm_100" in found["compiled_targets"]["triton"]
    code, out, _ = run("info")
    assert code == 0
    for name in ("torch", "triton", "reference", "cpu", "cuda", "emulated", "sm_90"):
        assert name in out


@pytest.mark.parametrize(
    ("versions", "warned"),
    [
        ({"torch": "2.13.0+cpu", "triton": "3.8.0"}, 0),
        ({"torch": "2.11.0", "triton": "3.6.1"}, 0),
        ({"torch": "2.14.1", "triton": ""}, 0),
        ({"torch": "2.10.0", "triton": "3.5.0"}, 2),
        ({"torch": "3.0.0", "triton": "3.8.0"}, 1),
        ({"torch": "2.15.0.dev20260101", "triton": "3.9.0"}, 2),
    ],
)
def test_untested_versions_are_a_warning(versions: dict[str, str], warned: int) -> None:
    warnings = environment.version_warnings(versions)
    assert len(warnings) == warned
    assert all("is untested; tested are" in line for line in warnings)


def test_validate_prints_a_table_or_json_lines(run: Cli) -> None:
    common = ("validate", "--quick", "--device", "cpu", "--backend", "cpu", "--op", "add_position", "--dtype", "fp32")
    code, out, _ = run(*common)
    assert code == 0 and "add_position" in out and "0 failed" in out
    code, out, _ = run(*common, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and {row["status"] for row in rows} == {"passed"}
    assert {row["op"] for row in rows} == {"add_position"} and {row["dtype"] for row in rows} == {"float32"}


def test_validate_fails_where_nothing_ran(run: Cli) -> None:
    code, out, err = run("validate", "--quick", "--device", "cpu", "--backend", "cuda")
    assert code == 1 and "nothing ran" in err and "cuda" in out


def test_validate_fails_on_a_wrong_backend(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvit.backend import implementation

    forward, backward = implementation("cpu", "add_position")

    def shifted(*arguments: Any, **keywords: Any) -> Any:
        return forward(*arguments, **keywords) + 0.01

    monkeypatch.setattr(f"{forward.__module__}.forward", shifted)
    implementation.cache_clear()
    try:
        code, out, _ = run("validate", "--quick", "--device", "cpu", "--backend", "cpu", "--op", "add_position")
    finally:
        monkeypatch.undo()
        implementation.cache_clear()
    assert code == 1 and "failed" in out


def test_bench_prints_ratios_or_json_lines(run: Cli, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    common = ("bench", "add_position", "--size", "tiny", "--device", "cpu", "--threads", "1")
    code, out, _ = run(*common, "--output", str(rows_file))
    assert code == 0 and "fastvit:cpu" in out
    assert rows_file.read_text().count("\n") > 1
    code, out, _ = run(*common, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    ours = [row for row in rows if row["provider"] == "fastvit:cpu"]
    assert code == 0 and ours and all(row["ratios"] and row["versions"]["torch"] for row in ours)


@pytest.fixture
def tiny_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1, "mlp_ratio": 1.0}
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", tiny)
    whole = digits_module.digit_tensors
    monkeypatch.setattr(digits_module, "digit_tensors", lambda: tuple(part[:200] for part in whole()))


@pytest.mark.usefixtures("tiny_digits")
def test_train_writes_and_resumes(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "run")
    common = ("train", "--epochs", "2", "--device", "cpu", "--no-tensorboard")
    code, out, _ = run(*common, "--output", output)
    assert code == 0 and "test accuracy" in out and output in out
    code, _, err = run(*common, "--output", output)
    assert code == 2 and err == (
        f"error: --output {output}: accepted is a folder without a run; go on with --resume {output}/last.pt\n"
    )

    from fastvit.training import loop

    finish = loop.finish_epoch

    def interrupted(*arguments: Any) -> None:
        finish(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finish_epoch", interrupted)
    code, out, _ = run(*common, "--output", str(tmp_path / "other"))
    assert code == 130 and "go on with: fastvit train --resume" in out
    monkeypatch.setattr(loop, "finish_epoch", finish)
    code, _, _ = run("train", "--resume", str(tmp_path / "other" / "last.pt"))
    assert code == 0
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("validate --backend tpu", "--backend tpu: accepted is one of reference, cpu, native, triton, cuda, emulated"),
        (
            "validate --op conv",
            "--op conv: accepted is one of add_norm, add_position, attention, bias_act, patch_embed, "
            "patch_embed_packed, split_heads",
        ),
        ("validate --dtype fp8", "--dtype fp8: accepted is one of float32"),
        ("validate --device tpu", "--device tpu: accepted is one of auto, cpu"),
        (
            "bench nothing",
            "suite nothing: accepted is one of add_norm, add_position, attention, bias_act, patch_embed, split_heads, "
            "masked",
        ),
        ("bench --size huge", "--size huge: accepted is one of tiny, small, full"),
        ("bench --threads 0", "--threads"),
        ("train --epochs -1", "--epochs -1: accepted is a whole number of at least 1"),
        ("train --epochs many", "--epochs"),
        ("train --lr nan", "--lr nan: accepted is a number above 0"),
        ("train --amp fp8", "--amp fp8: accepted is one of off, bf16, fp16"),
        ("train --batch-size -1", "--batch-size -1: accepted is"),
        ("train --data . --batch-size 8 --tokens-per-batch 400", "--batch-size 8: accepted is none beside"),
        ("train --tokens-per-batch 400", "--tokens-per-batch 400: accepted is a folder's alone"),
        ("train --max-tokens 40", "--max-tokens 40: accepted is with --tokens-per-batch alone (leave it out)"),
        ("train --ema 1", "--ema 1.0: accepted is a number from 0 to below 1"),
        ("train --mixup-prob 0.5", "--mixup-prob 0.5: accepted is with --mixup or --cutmix alone (leave it out)"),
        ("train --data . --tokens-per-batch 400 --cutmix 1", "--cutmix 1.0: accepted is 0 beside --tokens-per-batch"),
        ("train --data /no/such/folder", "--data /no/such/folder: accepted is 'digits' or a folder"),
        ("train --model vit_typo", "--model vit_typo: accepted is"),
        ("train --device cuda:99", "--device cuda:99: accepted is one of"),
        ("train --resume /no/such.pt", "/no/such.pt: no such file"),
        ("train --init-from /no/such.pt", "/no/such.pt: no such file"),
        ("train --epoch 3", "--epoch"),
        ("trian", "trian"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments.split())
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == [], "something was written"


def test_an_error_of_ours_keeps_its_traceback(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(environment, "collect", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("info")


def test_debugging_shows_the_traceback(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIT_DEBUG", "1")
    with pytest.raises(ValueError, match="epochs"):
        run("train", "--epochs", "-1")
