"""Checkpoints read from wherever they are: a file, a folder, a state_dict, a name on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError
from .formats import CONFIG, FOLDER_WEIGHTS, file_kind, read_json, read_npz, read_safetensors, read_torch
from .hub import download, hub_name
from .writing import write_checkpoint

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]

# Where tools put the weights inside their checkpoints; as in timm, an average over the training comes first.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "module",
    "weights",
    "teacher",
)
# What DistributedDataParallel, torch.compile and modules around the model put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")

DEPTH = 4  # wrappers inside each other, at most: a file may be made to hold itself
LISTED = 6  # names in a message, at most


@dataclass(frozen=True)
class Checkpoint:
    """What was read, before anything is known of the model.

    Attributes:
        state: flat names and CPU tensors, as the source has them; a wrapper around all names is taken off.
        config: config.json beside the weights, None without one.
        kind: "safetensors", "torch", "folder", "npz" or "state_dict".
        source: what to call it in a message.
        notes: what was done while reading: the key that the weights were under, a prefix taken off.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    kind: str
    source: str
    notes: tuple[str, ...] = ()


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> Checkpoint:
    """Read weights from wherever they are; no code in them is run.

    Args:
        source: a .safetensors, torch or .npz file, told by its contents and not its name; a folder with config.json,
            where it has one, and model.safetensors, pytorch_model.bin or shards with their index; a state_dict; or a
            name on the Hugging Face hub: "owner/name" or "hf-hub:owner/name", with "@revision" if wanted.

    Raises:
        CheckpointError: nothing there, no weights in it, truncated or damaged, or with Python objects in it.
        TypeError: `source` is none of the above.
        ImportError: safetensors or huggingface_hub is needed and not installed.
    """
    if isinstance(source, Mapping):
        state, notes = _unwrapped(source, "state_dict")
        return Checkpoint(state, None, "state_dict", "state_dict", notes)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: a {type(source).__name__}; accepted are a path, a state_dict and a name on the hub")
    path = Path(source).expanduser()
    if source == "":  # to Path, the current folder
        raise CheckpointError("source: empty; accepted are a path, a state_dict and a name on the hub")
    if path.is_dir():
        return _read_folder(path, str(source))
    if path.exists():
        return _read_file(path)
    name = hub_name(os.fspath(source))
    if name:
        return _read_folder(download(name), name)
    raise CheckpointError(f"{source}: no such file or folder; a name on the hub is written owner/name")


def _read_file(path: Path) -> Checkpoint:
    if path.suffix == ".json":
        raise CheckpointError(f"{path}: has no weights in it; name its folder, or the file with the weights")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    kind = file_kind(path)
    contents, config = _contents(path, kind)
    state, notes = _unwrapped(contents, str(path))
    # config.json is of these weights only where both have the names of a model's folder.
    if config is None and path.name in FOLDER_WEIGHTS and (path.parent / CONFIG).is_file():
        config = read_json(path.parent / CONFIG)
    return Checkpoint(state, config, kind, str(path), notes)


def _contents(path: Path, kind: str) -> tuple[Any, dict[str, Any] | None]:
    if kind == "safetensors":
        return read_safetensors(path)
    return read_npz(path) if kind == "npz" else read_torch(path), None


def _read_folder(folder: Path, source: str) -> Checkpoint:
    weights = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        found = _listed(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{source}: no {', '.join(FOLDER_WEIGHTS)} in this folder; found {found}")
    if weights.suffix == ".json":
        contents = _read_shards(weights)
    else:
        contents, _ = _contents(weights, file_kind(weights))
    state, notes = _unwrapped(contents, source)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return Checkpoint(state, config, "folder", source, notes)


def _read_shards(index: Path) -> dict[str, Any]:
    gathered: dict[str, Any] = {}
    for path, expected in _shards(index).items():
        contents, _ = _contents(path, file_kind(path))
        found = set(contents) if isinstance(contents, Mapping) else set()
        if found != expected:
            differing = _listed(sorted(map(str, found ^ expected)))
            raise CheckpointError(f"{path}: differs from what {index.name} says is in it: {differing}")
        gathered.update(contents)
    return gathered


def _shards(index: Path) -> dict[Path, set[str]]:
    """The files that an index names, with the names of the tensors in each."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index}: expected a weight_map from names of tensors to files")
    shards: dict[Path, set[str]] = {}
    for file in dict.fromkeys(names.values()):
        path = index.parent / file
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not a file of this folder")
        if not path.is_file():
            raise CheckpointError(f"{index}: the shard {file} is missing")
        shards[path] = {name for name, where in names.items() if where == file}
    return shards


def _unwrapped(contents: Any, source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state_dict inside what was read, with what was taken off around it."""
    notes = []
    for _ in range(DEPTH):
        inside = contents if isinstance(contents, Mapping) else {}
        key = next((key for key in WRAPPERS if isinstance(inside.get(key), Mapping)), None)
        if key is None:
            break
        others = _listed([str(other) for other in contents if other != key])
        notes.append(f"weights under {key!r}" + (f", beside {others}" if others else ""))
        contents = contents[key]
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{source}: no weights in it; expected a state_dict, found a {type(contents).__name__}")
    foreign = [f"{name} ({type(value).__name__})" for name, value in contents.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(f"{source}: not a state_dict; not a tensor: {_listed(foreign)}")
    if not contents:
        raise CheckpointError(f"{source}: no weights in it; it is empty")
    state = {str(name): tensor.detach().cpu() for name, tensor in contents.items()}
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) and name != p for name in state)), ""):
        notes.append(f"prefix {prefix!r} taken off every name")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, tuple(notes)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
