"""Checkpoints: written whole or not at all, read without running code from the file, refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.files import sync, written_whole

from .errors import CheckpointError

FORMAT = "fastvit-training-checkpoint"
VERSION = 1
REQUIRED = ("options", "model", "optimizer", "scaler", "epoch", "step", "random", "history", "data")
# Where other tools put the weights inside their checkpoints.
WEIGHT_KEYS = ("model", "state_dict", "model_state", "model_ema")
LISTED = 8  # names in an error, at most


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` to `path`: a reader sees the old file or the new one, never a part.

    The data reaches the disk before the name does, and the name before this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as fresh, fresh.open("wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **contents}, file)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def read_file(path: str | Path) -> Any:
    """What torch.save wrote to `path`, on the CPU. Runs nothing from the file. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # A broken or hostile file raises RuntimeError, UnpicklingError, EOFError, KeyError … by where it breaks.
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint; it is truncated, corrupt or holds more than tensors and plain "
            f"values ({type(error).__name__}, {path.stat().st_size} bytes)"
        ) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that `save_checkpoint` wrote. Raises CheckpointError for anything else."""
    contents = read_file(path)
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a training checkpoint; accepted is a file that `fastvit train` wrote")
    if contents.get("version") != VERSION:
        raise CheckpointError(f"{path}: checkpoint version {contents.get('version')!r}; accepted is {VERSION}")
    missing = [key for key in REQUIRED if key not in contents]
    if missing:
        raise CheckpointError(f"{path}: incomplete checkpoint, without {', '.join(missing)}")
    return contents


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in `path`: a training checkpoint, a plain state_dict, or one under a usual key."""
    contents = read_file(path)
    for key in WEIGHT_KEYS:
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    if not isinstance(contents, dict) or not contents or not all(isinstance(v, Tensor) for v in contents.values()):
        raise CheckpointError(f"{path}: no weights in it; accepted is a state_dict or a file `fastvit train` wrote")
    # What DistributedDataParallel and torch.compile put before a name.
    return {str(k).removeprefix("module.").removeprefix("_orig_mod."): v for k, v in contents.items()}


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Load all of `weights` into `model`, or raise CheckpointError that lists what differs and load nothing."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (("shapes differ", shapes), ("missing", missing), ("not in the model", unknown))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source}: does not fit the model; " + "; ".join(problems))
    model.load_state_dict(weights)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
