"""What happens where a process is killed, a disk is full, a checkpoint is cut off, or one process differs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit.training import CheckpointError
from fastvit.training.distributed import Team
from fastvit.training.failures import SharedError, check_agreement
from fastvit.training.saving import CompleteError, begin_or_resume, load_note
from fastvit.training.shard_writer import folders_in
from tests.training.runs import free_port
from tests.two_processes import ended, needs_gloo

pytestmark = needs_gloo

ROOT = Path(__file__).parents[2]
FAULTY = [sys.executable, "-m", "tests.training.faulty"]
RUN = ["--epochs", "2", "--batch-size", "240", "--shard", "full", "--save-steps", "1", "--keep", "2"]  # 3 steps each
Fault = dict[str, Any]


def under_torchrun(output: Path, faults: list[Fault], *options: str) -> subprocess.CompletedProcess[str]:
    """Two processes, started again as often as there are faults."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", str(len(faults)), "-m", "tests.training.faulty", json.dumps(faults)]
    return subprocess.run(
        [*command, *RUN, "--output", str(output), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def in_two(output: Path, faults: list[Fault], *options: str) -> tuple[list[int], list[str]]:
    """Exit codes, and what each of two processes wrote to standard error."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*FAULTY, json.dumps(faults), *RUN, "--output", str(output), *options],
            cwd=ROOT,
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = ended(started, timeout=120)
    return [process.returncode for process in started], errors


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("straight") / "run"
    codes, errors = in_two(output, [])
    assert codes == [0, 0], "\n".join(errors)
    return output


def history(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


def test_a_killed_process_costs_what_was_not_saved_and_nothing_else(tmp_path: Path, straight: Path) -> None:
    faults = [
        {"place": "step", "deed": "kill", "rank": 1, "at": 2},
        {"place": "save", "deed": "kill", "rank": 1, "at": 2},
        {"place": "publish", "deed": "kill", "rank": 0, "at": 2},
        {"place": "evaluation", "deed": "kill", "rank": 0, "at": 1},
    ]
    output = tmp_path / "run"
    done = under_torchrun(output, faults, "--resume", "auto")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("SIGKILL") >= len(faults) or done.stderr.count("exitcode: -9") >= len(faults)
    assert history(output) == history(straight)
    assert [path.name for path in folders_in(output)] == [path.name for path in folders_in(straight)]
    assert {path.name for path in output.iterdir()} == {path.name for path in straight.iterdir()}, "left over"
    with pytest.raises(CompleteError, match="this run is complete"):
        begin_or_resume({"output": str(output)}, "auto")


def test_what_processes_must_agree_on() -> None:
    class Two(Team):
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "data": "another"}]

    facts = {"torch": "2", "data": "one"}
    check_agreement(Team(torch.device("cpu")), facts)
    with pytest.raises(SharedError, match="process 1 has data 'another', the first one 'one'"):
        check_agreement(Two(torch.device("cpu")), facts)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"place": "save", "deed": "no_space", "rank": 1, "at": 2}, "a checkpoint can't be written .*No space left"),
        ({"place": "publish", "deed": "no_space", "rank": 0, "at": 2}, "a checkpoint can't be written .*No space left"),
        ({"place": "read", "deed": "no_image", "rank": 1, "at": 3}, "process 1 of 2: b/3.png: the image cannot be"),
        ({"place": "versions", "deed": "other_versions", "rank": 1}, "process 1 has fastvit '0.0.1', the first one"),
        ({"place": "step", "deed": "no_such_name", "rank": 1, "at": 2}, r"(?s)process 1 of 2: Traceback.*of ours"),
        ({"place": "step", "deed": "kill", "rank": 1, "at": 2}, "another process of the run has ended, or"),
    ],
    ids=lambda value: f"{value['deed']}-{value['place']}-{value['rank']}" if isinstance(value, dict) else "",
)
def test_one_error_from_the_first_process(tmp_path: Path, fault: Fault, message: str) -> None:
    codes, (first, other) = in_two(tmp_path / "run", [fault])
    assert re.search(message, first), first
    assert first.count("error: ") == 1 and "error" not in other, f"{first}\n---\n{other}"
    assert all(codes), "every process ends"
    left = [path for path in folders_in(tmp_path / "run")]
    for checkpoint in left:  # what was written before is whole
        assert (checkpoint / "run.pt").stat().st_size and (checkpoint / ".metadata").stat().st_size


def damaged(straight: Path, folder: Path, what: str) -> tuple[Path, str]:
    """A checkpoint's file that was changed, and what is to be said of it."""
    shutil.copytree(folders_in(straight)[0], folder)
    shard = folder / (".metadata" if what == "metadata" else "run.pt" if what == "note" else "__1_0.distcp")
    size = shard.stat().st_size
    if what == "missing":
        shard.unlink()
    else:
        os.truncate(shard, size // 2)
    said = {"cut off": f"cut off: {size // 2} of {size} bytes", "missing": "missing", "note": "truncated"}
    return shard, said.get(what, "truncated or damaged")


@pytest.mark.parametrize("what", ["cut off", "missing", "metadata", "note"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, straight: Path, what: str) -> None:
    shard, said = damaged(straight, tmp_path / "epoch-0001", what)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(shard))}: {said}"):
        load_note(tmp_path / "epoch-0001")


def test_a_damaged_checkpoint_is_named_once_and_left_alone(tmp_path: Path, straight: Path) -> None:
    shard, said = damaged(straight, tmp_path / "run" / "epoch-0001", "cut off")
    before = {path: path.stat().st_mtime_ns for path in shard.parent.iterdir()}
    codes, (first, other) = in_two(tmp_path / "run", [], "--resume", str(shard.parent))
    assert first == f"error: {shard}: {said}\n" and all(codes)
    assert other in ("", first), "without torchrun nobody ends the other, which speaks for itself after a while"
    assert {path: path.stat().st_mtime_ns for path in shard.parent.iterdir()} == before
