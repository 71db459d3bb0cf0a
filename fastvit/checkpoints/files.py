"""Checkpoints read from wherever they are: a file, a folder, a state_dict, a name on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError, listed
from .formats import CONFIG, FOLDER_WEIGHTS, read_file, read_json
from .sharded import is_sharded_folder, read_sharded

# Files of folders that have weights of another kind.
_FOREIGN_FOLDERS = {
    "adapter_config.json": "an adapter of peft's without its model; merge them, with merge_and_unload(), and save that",
}
RUN = "run.pt"  # what `fastvit train` keeps beside shards: all that is no tensor of the model
_RUN_S = re.compile(r"(last|best)\.pt|epoch-\d+(-step-\d+)?")  # its checkpoints
DEPTH = 8  # dictionaries inside each other, at most

_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "hf://")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# What a file is called that was meant by "folder/file".
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".json", ".ckpt")

# The first that has weights: a repository often holds the same ones several times.
_HUB_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)


@dataclass(frozen=True)
class Checkpoint:
    """What was read, before anything is known of the model.

    Attributes:
        state: names and CPU tensors; one inside other dictionaries has their keys before its name, with dots.
        config: config.json beside the weights, None without one.
        kind: "safetensors", "torch", "folder", "npz" or "state_dict".
        source: what to call it in a message.
        others: names of what is no tensor.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    kind: str
    source: str
    others: tuple[str, ...] = ()


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any], *, allow: Sequence[str] = ()) -> Checkpoint:
    """Read weights from wherever they are; no code in them is run.

    Args:
        source: a .safetensors, torch or .npz file, told by its contents and not its name; a folder with config.json,
            where it has one, and model.safetensors, pytorch_model.bin or shards with their index; a folder of
            torch.distributed.checkpoint; a state_dict; or a name on the Hugging Face hub: "owner/name" or
            "hf-hub:owner/name", with "@revision" if wanted.
        allow: full names of classes, such as "package.module.Class", whose objects may be in a torch file. They are
            left out, as are plain values (`argparse.Namespace`, paths, NumPy's numbers); no class is ever run.

    Raises:
        CheckpointError: nothing there, no weights in it, truncated or damaged, or with other Python objects in it.
        TypeError: `source` is none of the above, or `allow` no list of names.
        ImportError: huggingface_hub is needed and not installed.
    """
    if isinstance(allow, str) or not all(isinstance(name, str) for name in allow):
        raise TypeError(f"allow: {allow!r}; accepted is a list of names, such as ['package.module.Class']")
    if isinstance(source, Mapping):
        return _flat(source, None, "state_dict", "state_dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: a {type(source).__name__}; accepted are a path, a state_dict and a name on the hub")
    path = Path(source).expanduser()
    if source == "":  # to Path, the current folder
        raise CheckpointError("source: empty; accepted are a path, a state_dict and a name on the hub")
    if path.is_dir():
        return _read_folder(path, str(source), allow)
    if path.exists():
        return _read_file(path, allow)
    name = hub_name(os.fspath(source))
    if name:
        return _read_folder(download(name), name, allow)
    raise CheckpointError(f"{source}: no such file or folder; a name on the hub is written owner/name")


def _read_file(path: Path, allow: Sequence[str]) -> Checkpoint:
    if path.suffix == ".json":
        raise CheckpointError(f"{path}: has no weights in it; name its folder, or the file with the weights")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    kind, contents, config = read_file(path, allow)
    # config.json is of these weights only where both have the names of a model's folder.
    if config is None and path.name in FOLDER_WEIGHTS and (path.parent / CONFIG).is_file():
        config = read_json(path.parent / CONFIG)
    return _flat(contents, config or _inner_config(contents), kind, str(path))


def _inner_config(contents: Any) -> dict[str, Any] | None:
    """That which `fastvit train` keeps beside the weights, in the same file."""
    inside = contents.get("config") if isinstance(contents, dict) else None
    return inside if isinstance(inside, dict) and "fastvit" in inside else None


def _read_folder(folder: Path, source: str, allow: Sequence[str]) -> Checkpoint:
    if is_sharded_folder(folder):
        return _flat(read_sharded(folder), _trained_config(folder / RUN, allow), "shards", source)
    weights = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        for name, meaning in _FOREIGN_FOLDERS.items():
            if (folder / name).is_file():
                raise CheckpointError(f"{source}: {meaning}")
        if of_a_run := sorted(path.name for path in folder.iterdir() if _RUN_S.fullmatch(path.name)):
            raise CheckpointError(f"{source}: the folder of a run; name one of its checkpoints: {listed(of_a_run)}")
        found = listed(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{source}: no {', '.join(FOLDER_WEIGHTS)} in this folder; found {found}")
    contents = _read_shards(weights, allow) if weights.suffix == ".json" else read_file(weights, allow)[1]
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return _flat(contents, config, "folder", source)


def _trained_config(path: Path, allow: Sequence[str]) -> dict[str, Any] | None:
    return _inner_config(read_file(path, allow)[1]) if path.is_file() else None


def _read_shards(index: Path, allow: Sequence[str]) -> dict[str, Any]:
    """The contents of the files that an index names; each has to be what the index says."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{index}: expected a weight_map from names of tensors to files")
    shards = list(dict.fromkeys(names.values()))
    for file in shards:
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file!r} is not a file of this folder")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: the shard {file} is missing")
    gathered: dict[str, Any] = {}
    for file in shards:
        contents = read_file(index.parent / file, allow)[1]
        found = set(contents) if isinstance(contents, Mapping) else set()
        if differing := found ^ {name for name, where in names.items() if where == file}:
            what = listed(sorted(map(str, differing)))
            raise CheckpointError(f"{index.parent / file}: differs from what {index.name} says is in it: {what}")
        gathered.update(contents)
    return gathered


def _flat(contents: Any, config: dict[str, Any] | None, kind: str, source: str) -> Checkpoint:
    """The tensors in dictionaries inside each other, each of which is looked at once."""
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{source}: no weights in it; expected a state_dict, found a {type(contents).__name__}")
    state: dict[str, Tensor] = {}
    others: list[str] = []
    seen: set[int] = set()

    def visit(mapping: Mapping[Any, Any], path: str, depth: int) -> None:
        seen.add(id(mapping))
        # by the classes' own methods: a pickle may have put others into an instance
        for key, value in dict.items(mapping) if isinstance(mapping, dict) else mapping.items():
            if f"{path}{key}" in state:
                raise CheckpointError(f"{source}: {path}{key} is there twice, by itself and inside another key")
            if isinstance(value, Tensor):
                state[f"{path}{key}"] = Tensor.detach(value).cpu()
            elif not isinstance(value, Mapping) or not value:
                others.append(f"{path}{key}")
            elif depth < DEPTH and id(value) not in seen:
                visit(value, f"{path}{key}.", depth + 1)

    visit(contents, "", 1)
    if not state:
        raise CheckpointError(f"{source}: no weights in it; it {'has ' + listed(others) if others else 'is empty'}")
    return Checkpoint(state, config, kind, source, tuple(others))


def hub_name(source: str) -> str:
    """`source` as "owner/name" or "owner/name@revision" where it can be a name on the hub, else ""."""
    for prefix in _HUB_PREFIXES:
        if source.startswith(prefix):
            return source.removeprefix(prefix)
    return source if _HUB_NAME.fullmatch(source) and not source.endswith(_FILE_SUFFIXES) else ""


def download(name: str) -> Path:
    """The folder with config.json and the weights of `name`, from the hub or from its cache.

    Raises:
        CheckpointError: the name is no name, is not there, or neither hub nor cache has it within reach.
        ImportError: huggingface_hub is not installed.
    """
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name}: not a name on the hub; accepted is owner/name or owner/name@revision")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ImportError(f"{name}: a name on the hub needs huggingface_hub (pip install huggingface_hub)") from error
    repository, _, revision = name.partition("@")
    for weights in _HUB_WEIGHTS:
        try:
            folder = hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=["config.json", *weights]
            )
        # The hub's own errors, the network library's (it differs by version), the cache's.
        except Exception as error:
            raise CheckpointError(_reason(name, error)) from error
        if any((Path(folder) / file).is_file() for file in FOLDER_WEIGHTS):
            return Path(folder)
    raise CheckpointError(
        f"{name}: the repository has no weights that can be read (model.safetensors, pytorch_model.bin)"
    )


def _reason(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{name}: the repository asks for access; request it on the hub and log in with `hf auth login`"
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return f"{name}: no such file or folder, and no such repository or revision on the hub"
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return f"{name}: no such file or folder, and the hub can't be reached and its cache has no copy"
    return f"{name}: no such file or folder, and the hub gave {kind}: {text[:160]}"
