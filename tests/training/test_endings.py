"""How a run in shards ends before its time, what it goes on from, and what FSDP2's own mixed precision makes of it."""

from __future__ import annotations

import functools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

import fastvit
from fastvit import stream
from fastvit.training import CheckpointError, OptionError, TrainingError, TrainOptions, resume_options, train
from fastvit.training.saving import begin_or_resume
from fastvit.training.shard_writer import ShardWriter, folders_in
from tests.training.runs import TINY, StopAt
from tests.two_processes import needs_gloo

pytestmark = [needs_gloo, pytest.mark.usefixtures("tiny")]
STEPS = 6  # an epoch


def options(output: Path, **given: Any) -> TrainOptions:
    settings = {"device": "cpu", "tensorboard": False, "threads": 1, "epochs": 3, "batch_size": 240, **given}
    return TrainOptions(output=str(output), **settings)


def found(output: Path) -> list[str]:
    return [path.name for path in folders_in(output)]


def test_what_is_being_written_is_written_though_the_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FileSystemWriter.write_data

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", slowly)
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path, shard="full"), observers=[StopAt(STEPS + 1)])
    assert found(tmp_path) == ["epoch-0001"]


def test_what_comes_behind_is_set_aside_where_a_run_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path, shard="full", epochs=6, keep=9, lr=1e-9), observers=[StopAt(5 * STEPS + 3)])
    assert found(tmp_path) == [f"epoch-{epoch:04}" for epoch in range(1, 6)]
    going, contents = resume_options(tmp_path / "epoch-0002", {"keep": 2})
    with pytest.raises(KeyboardInterrupt):
        train(going, resume=contents, observers=[StopAt(STEPS + 1)])
    assert found(tmp_path) == [f"epoch-{epoch:04}" for epoch in range(1, 4)], "the first one is the best"
    assert {path.name for path in tmp_path.glob("*.before")} == {"epoch-0004.before", "epoch-0005.before"}
    assert begin_or_resume({"output": str(tmp_path)}, "auto")[1]["epoch"] == 3  # type: ignore[index]


def test_what_goes_wrong_in_the_background_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: Any, **__: Any) -> None:
        raise LookupError("a mistake of ours")

    monkeypatch.setattr(ShardWriter, "_publish", mistaken)
    with pytest.raises(TrainingError, match=r"a checkpoint can't be written \(.*a mistake of ours"):
        train(options(tmp_path, shard="full"))


def test_two_runs_do_not_meet_in_a_folder(tmp_path: Path) -> None:
    for name, shard in (("a", "none"), ("b", "none"), ("c", "full")):
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path / name, shard=shard), observers=[StopAt(STEPS + 1)])
    for name in "bc":
        going, contents = resume_options(tmp_path / "a", {"output": str(tmp_path / name)})
        with pytest.raises(OptionError, match=f"output = '.*{name}': accepted is a folder without a run"):
            train(going, resume=contents)


def test_auto_passes_over_what_is_damaged_and_says_so(tmp_path: Path) -> None:
    train(options(tmp_path, shard="full", epochs=3))
    last, before = folders_in(tmp_path)[:-3:-1]
    os.truncate(last / "__0_0.distcp", 9)
    with pytest.warns(UserWarning, match=f"passed over: {last}/__0_0.distcp: cut off"):
        _, contents = begin_or_resume({"output": str(tmp_path)}, "auto")
    assert contents is not None and contents["folder"] == str(before)
    for path in folders_in(tmp_path):
        os.truncate(path / "__0_0.distcp", 9)
    with pytest.raises(CheckpointError, match=f"{last}/__0_0.distcp: cut off"):
        begin_or_resume({"output": str(tmp_path)}, "auto")


def test_weights_that_a_run_began_with_may_be_gone(tmp_path: Path) -> None:
    train(options(tmp_path / "first", epochs=1))
    with pytest.raises(KeyboardInterrupt):
        given = {"init_from": str(tmp_path / "first" / "last.pt")}
        train(options(tmp_path / "second", **given), observers=[StopAt(STEPS + 1)])
    shutil.rmtree(tmp_path / "first")
    going, contents = resume_options(tmp_path / "second", {})
    assert train(going, resume=contents).epoch == 3


def test_a_process_killed_while_it_removes_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    train(options(tmp_path, shard="full", keep=1, lr=1e-2))
    assert len(found(tmp_path)) <= 2, "the last and the best one"


@pytest.mark.parametrize("shard", ["none", "full"])
def test_going_on_where_the_scaler_has_skipped_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**30)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    given = {"amp": "fp16", "save_steps": 1, "epochs": 4, "shard": shard}
    straight = train(options(tmp_path / "straight", **given))
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "broken", **given), observers=[StopAt(3)])
    going, contents = resume_options(tmp_path / "broken", {})
    result = train(going, resume=contents)
    assert result.history == straight.history
    steps = [{int(state["step"]) for state in run.optimizer.state.values()} for run in (straight, result)]
    assert steps[0] == steps[1] != set(), "some steps are skipped, and others are not"


def test_stochastic_depth_in_a_policy_of_fsdp2(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy casts all that a block is given: also the factors of the branch before it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {**TINY, "depth": 3, "drop_path_rate": 0.5}
    logits = []
    for least in (0, 2**40):  # by the trunk's ops, and by modules
        monkeypatch.setattr(stream, "LEAST_ON_A_CPU", least)
        torch.manual_seed(0)
        model: Any = fastvit.VisionTransformer(16, num_classes=7, **arguments)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.train()
        torch.manual_seed(2)
        logits.append(model(images))
        logits[-1].float().square().sum().backward()
    torch.testing.assert_close(*logits, rtol=2e-2, atol=1e-2)
