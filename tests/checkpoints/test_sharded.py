"""Folders of torch.distributed.checkpoint: whole tensors out of them, and no code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

import fastvit
from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.sharded import load_into, read_metadata, read_sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
ARGUMENTS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


def write(folder: Path, state: dict[str, Any]) -> Path:
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)
    return folder


@pytest.fixture
def model() -> fastvit.VisionTransformer:
    torch.manual_seed(0)
    return fastvit.VisionTransformer(num_classes=5, **ARGUMENTS)


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_comes_out_of_it(tmp_path: Path, model: fastvit.VisionTransformer, inside: bool) -> None:
    """With and without a key before the names, and beside what is no tensor."""
    state: Any = model.state_dict()
    folder = write(tmp_path / "a", {"model": state, "epoch": 3} if inside else state)
    loaded = fastvit.load_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_optimizer_is_left_where_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"model": {"w": torch.ones(3)}, "optimizer": {"w": {"exp_avg": torch.ones(3)}}})
    assert list(read_sharded(folder)) == ["model.w"]
    assert list(read_sharded(folder, leave_out="model.")) == ["optimizer.w.exp_avg"]


def test_what_does_not_fit_is_listed_before_anything_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"model": {"w": torch.ones(3), "v": torch.ones(2)}})
    wanted = {"model": {"w": torch.zeros(4), "v": torch.zeros(2), "x": torch.zeros(1)}}
    with pytest.raises(CheckpointError, match=r"not fit; model.w: shape \[3\] in .*\[4\] here; model.x: missing"):
        load_into(folder, wanted)
    assert not wanted["model"]["v"].any()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HOSTILE_FOLDER"],)


def test_nothing_in_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path / "made"))
    folder = write(tmp_path / "a", {"w": torch.ones(3)})
    metadata = read_metadata(folder)
    metadata.planner_data = Hostile()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"\.metadata: it names .*, which no list of tensors has; nothing"):
        fastvit.load_pretrained(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["os.system", "os", "dataclass"])
def test_what_its_classes_stand_among_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "a", {"w": torch.ones(3)})
    module = "torch.distributed.checkpoint.metadata"
    # Protocol 4: two strings and STACK_GLOBAL, which also takes names with dots.
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    (folder / ".metadata").write_bytes(b"\x80\x04" + strings + b"\x93.")
    with pytest.raises(CheckpointError, match=f"it names {module}.{name}"):
        read_metadata(folder)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"w": torch.ones(3)})
    metadata = read_metadata(folder)
    for place in metadata.storage_data.values():
        object.__setattr__(place, "relative_path", "../other")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="'../other' is not a file of this folder"):
        read_metadata(folder)


@pytest.mark.parametrize("size", [0, 1, 20, -1])
def test_a_cut_list(tmp_path: Path, size: int) -> None:
    folder = write(tmp_path / "a", {"w": torch.ones(3)})
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"\.metadata: truncated or damaged"):
        read_metadata(folder)
