"""Checkpoint files of a run: written whole or not at all, read without running code from the file."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.formats import read_file
from fastvit.checkpoints.sharded import reason_of
from fastvit.files import sync, written_whole
from fastvit.model.checkpoints import check_state_dict

FORMAT = "fastvit-training-checkpoint"
VERSION = 3
_CUT_OFF = ("inline_container.cc", "iostream error", "PytorchStreamWriter failed")
LONGEST = 600  # characters of torch's list of what does not fit


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` to `path`: a reader sees the old file or the new one, never a part.

    The data reaches the disk before the name does, and the name before this returns. Raises CheckpointError where that
    can't be, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with written_whole(path) as fresh:
            torch.save({"format": FORMAT, "version": VERSION, **contents}, fresh)
            sync(fresh)
        sync(path.parent)
    except Exception as error:
        if not isinstance(error, OSError) and not is_cut_off(error):
            raise
        reason = unwritten(error)
        raise CheckpointError(f"{path}: a checkpoint can't be written ({reason}); older ones are whole") from error


def is_cut_off(error: BaseException) -> bool:
    """Whether torch could not write a file to its end; its error does not have the system's."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _CUT_OFF)


def unwritten(error: BaseException) -> str:
    """Why a checkpoint, a file or shards, was not written."""
    reason = reason_of(error)
    if any(part in reason for part in _CUT_OFF):
        return "a file could not be written to its end, as on a full disk"
    return reason


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that `save_checkpoint` wrote. Raises CheckpointError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    contents = read_file(path)[1]
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint; accepted is a file that `fastvit train` wrote")
    if contents.get("version") != VERSION:
        found = f"checkpoint version {contents.get('version')!r}; accepted is {VERSION}"
        raise CheckpointError(f"{path}: {found}. A new run can begin with its weights: --init-from {path}")
    return contents


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Raise CheckpointError that lists what differs where `weights` are not all of those of `model`."""
    try:
        check_state_dict(model, weights, prefix="", strict=True)
    except RuntimeError as error:
        reason = shorten("; ".join(str(error).splitlines()[1:]), LONGEST, placeholder=" …")
        raise CheckpointError(f"{source}: does not fit the model; {reason}") from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Load all of `weights` into a new `model`. Raises CheckpointError that lists what differs."""
    check_weights(model, weights, source)
    model.load_state_dict(weights)
