"""Checkpoints of a run: on the disk before they have their name, never run as code, refused with a reason."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpointing
from torch import nn

from fastvit.training import CheckpointError
from fastvit.training import checkpoint as module
from fastvit.training.checkpoint import load_checkpoint, load_weights, save_checkpoint, unwritten


def test_what_was_saved_comes_back_and_a_part_of_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.pt"
    save_checkpoint(path, {"model": {"weight": torch.ones(2, 3)}})
    assert torch.equal(load_checkpoint(path)["model"]["weight"], torch.ones(2, 3))
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"last.pt: (an empty|not a checkpoint|truncated)[^\n]*$"):
            load_checkpoint(path)


def test_data_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    save_checkpoint(tmp_path / "last.pt", {})
    assert order == ["fsync", "replace", "fsync"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk with room for so many bytes, as far as one file goes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_in_words_and_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": torch.ones(2)})
    for name in (path, tmp_path / "best.pt"):
        with (
            largest_file(100_000),
            pytest.raises(CheckpointError, match=f"^{name}: a checkpoint can't be written .*full disk.*are whole$"),
        ):
            save_checkpoint(name, {"model": torch.ones(100_000)})
    assert [*tmp_path.iterdir()] == [path] and torch.equal(load_checkpoint(path)["model"], torch.ones(2))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_shards_on_a_full_disk_are_said_in_words(tmp_path: Path) -> None:
    with largest_file(100_000), pytest.raises(checkpointing.CheckpointException) as caught:
        checkpointing.save({"model": torch.ones(100_000)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert unwritten(caught.value) == "a file could not be written to its end, as on a full disk"


def test_a_mistake_of_ours_in_writing_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle") as caught:
        save_checkpoint(tmp_path / "last.pt", {"x": lambda: 0})
    assert not isinstance(caught.value, CheckpointError)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HOSTILE_FOLDER"],)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path / "made"))
    save_checkpoint(tmp_path / "last.pt", {"x": Hostile()})
    with pytest.raises(CheckpointError, match="not loaded"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists()


def test_foreign_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="a.pt: no such file"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a file"):
        load_checkpoint(tmp_path)
    for contents in ({"state_dict": {}}, [1, 2]):
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match="not a training checkpoint"):
            load_checkpoint(path)
    torch.save({"format": module.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99; accepted is 3"):
        load_checkpoint(path)


def test_what_does_not_fit_is_listed_in_one_line_of_bearable_length() -> None:
    weights = {"0.weight": torch.zeros(2, 4), "1.weight": torch.zeros(2, 2), "x": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2)), weights, "a.pt")
    for part in ("a.pt: does not fit the model; ", "1.bias", "x: not", "0.weight", "[2, 4]", "[2, 3]"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Linear(2, 2), {f"name{number}": torch.ones(1) for number in range(999)}, "a.pt")
    assert len(str(caught.value)) < 800
