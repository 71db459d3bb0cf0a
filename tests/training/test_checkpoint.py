"""Checkpoints: whole or absent, never run as code, refused with a reason that names the file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastvit.training import CheckpointError
from fastvit.training import checkpoint as module
from fastvit.training.checkpoint import REQUIRED, load_checkpoint, load_weights, read_weights, save_checkpoint


def contents(value: float = 1.0) -> dict[str, Any]:
    return {**{key: {} for key in REQUIRED}, "model": {"weight": torch.full((2, 3), value)}}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "last.pt", contents())
    assert torch.equal(load_checkpoint(tmp_path / "new" / "last.pt")["model"]["weight"], torch.ones(2, 3))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.pt"]


@pytest.mark.parametrize("fault", ["while writing", "at fsync", "at the rename"])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, contents(1.0))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    def write_half(_: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        fail()

    if fault == "while writing":
        monkeypatch.setattr(module.torch, "save", write_half)
    else:
        monkeypatch.setattr(os, "fsync" if fault == "at fsync" else "replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, contents(2.0))
    monkeypatch.undo()
    assert load_checkpoint(path)["model"]["weight"].max() == 1.0
    assert [found.name for found in tmp_path.iterdir()] == ["last.pt"], "a temporary file was left behind"


def test_data_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    save_checkpoint(tmp_path / "last.pt", contents())
    assert order == ["fsync", "replace", "fsync"]


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, contents())
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="last.pt: cannot be read as a checkpoint; it is truncated") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HOSTILE_FOLDER"],)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path / "made"))
    torch.save({"format": module.FORMAT, "x": Hostile()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="more than tensors"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_foreign_and_incomplete_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="a.pt: no such file"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a file"):
        load_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(path)
    torch.save({"format": module.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99; accepted is 1"):
        load_checkpoint(path)
    save_checkpoint(path, {key: value for key, value in contents().items() if key not in ("step", "random")})
    with pytest.raises(CheckpointError, match="without step, random"):
        load_checkpoint(path)


def test_weights_are_found_where_tools_put_them(tmp_path: Path) -> None:
    weights = {"weight": torch.randn(2, 2), "bias": torch.randn(2)}
    path = tmp_path / "w.pt"
    for stored in (weights, {"state_dict": weights}, {"model": {f"module.{k}": v for k, v in weights.items()}}):
        torch.save(stored, path)
        model = nn.Linear(2, 2)
        load_weights(model, read_weights(path), path)
        assert torch.equal(model.weight, weights["weight"])
    torch.save({"lr": 1.0}, path)
    with pytest.raises(CheckpointError, match="no weights in it"):
        read_weights(path)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {
        "0.weight": torch.zeros(2, 4),
        "0.bias": torch.zeros(2),
        "1.weight": torch.zeros(2, 2),
        "x": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, "a.pt")
    assert str(caught.value) == (
        "a.pt: does not fit the model; shapes differ: 0.weight is (2, 4), the model's (2, 3); missing: 1.bias; "
        "not in the model: x"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
