"""Folders of shards, as torch.distributed.checkpoint writes them, read without running code from them.

Which tensors there are and where they lie is in a pickle, ``.metadata``. It is read here first, with nothing but the
classes that a list of tensors has; any other is refused before torch reads it.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, listed

METADATA = ".metadata"
_VALUES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(str(value).removeprefix("torch.") for value in vars(torch).values() if type(value) is torch.dtype),
    },
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _VALUES.get(module, ()):
            raise CheckpointError(f"it names {module}.{name}, which no list of tensors has; nothing of it was run")
        return super().find_class(module, name)


def is_sharded_folder(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> Any:
    """What is in a folder and where: torch's Metadata. Every file is there and as long as it says.

    Raises:
        CheckpointError: no such folder, damaged, cut off, or with other Python objects in it.
    """
    path = folder / METADATA
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {METADATA} in this folder; it is no checkpoint in shards, or not whole")
    try:
        with path.open("rb") as file:
            metadata = _Reader(file).load()
        tensors, places = metadata.state_dict_metadata, metadata.storage_data.values()
        ends: dict[str, int] = {}
        for place in places:
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        assert all(isinstance(name, str) for name in tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # UnpicklingError, EOFError, AttributeError …, by where it breaks
        raise CheckpointError(f"{path}: truncated or damaged ({type(error).__name__})") from error
    for name, end in ends.items():
        shard = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{path}: {name!r} is not a file of this folder")
        size = shard.stat().st_size if shard.is_file() else -1
        if size < end:
            raise CheckpointError(f"{shard}: " + ("missing" if size < 0 else f"cut off: {size} of {end} bytes"))
    return metadata


def load_into(folder: Path, state: Mapping[str, Any], metadata: Any = None) -> None:
    """Fill the tensors of `state`, which may be shards themselves, and in dictionaries inside each other.

    Every process of a group must call. Raises CheckpointError where they are not those of the folder.

    Args:
        metadata: what `read_metadata` gives, where that was read already.
    """
    from torch import distributed
    from torch.distributed import checkpoint

    stored = shapes_in(metadata or read_metadata(folder))
    wanted = {name: tuple(tensor.shape) for name, tensor in flat(state).items()}
    missing = [f"{name}: missing" for name in wanted if name not in stored]
    others = [
        f"{name}: shape {list(stored[name])} in the checkpoint, {list(shape)} here"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if missing or others:
        raise CheckpointError(f"{folder}: does not fit; {listed([*others, *missing], by='; ')}")
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        try:
            checkpoint.load(dict(state), storage_reader=checkpoint.FileSystemReader(folder), no_dist=is_alone)
        except Exception as error:  # one of torch's own that holds those of all processes
            raise CheckpointError(f"{folder}: the shards can't be read ({reason_of(error)})") from error


def read_sharded(folder: Path, leave_out: str = "optimizer.") -> dict[str, Tensor]:
    """Whole tensors by their names, with the keys they are under before them; CPU."""
    metadata = read_metadata(folder)
    state = {
        name: torch.empty(shape, dtype=metadata.state_dict_metadata[name].properties.dtype)
        for name, shape in shapes_in(metadata).items()
        if not name.startswith(leave_out)
    }
    load_into(folder, state, metadata)
    return state


def shapes_in(metadata: Any) -> dict[str, tuple[int, ...]]:
    """Of the tensors, by name; what is no tensor has none."""
    found = metadata.state_dict_metadata.items()
    return {name: tuple(entry.size) for name, entry in found if hasattr(entry, "size")}


def flat(state: Mapping[str, Any], before: str = "") -> dict[str, Tensor]:
    """The tensors in dictionaries inside each other, by their keys with dots between."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        found |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def reason_of(error: BaseException) -> str:
    """The first of those that torch gathers from all processes."""
    inner = next(iter(getattr(error, "failures", {}).values()), error)
    inner = inner[0] if isinstance(inner, tuple) else inner
    return f"{type(inner).__name__}: {' '.join(str(inner).split())[:300]}"
