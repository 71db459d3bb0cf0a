"""Checkpoints written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastvit.files import sync, written_whole

from .errors import CheckpointError
from .formats import CONFIG, CONFIG_KEY, WEIGHTS

TORCH_SUFFIXES = (".pth", ".pt")
ACCEPTED = f"accepted are .safetensors, {', '.join(TORCH_SUFFIXES)} or, with a config, the name of a folder"


def write_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write weights, all of them or nothing: they get their name when they are complete and on the disk.

    Args:
        path: a name in .safetensors, .pth or .pt; or a folder's, which gets config.json and model.safetensors.
        state: names and dense tensors, on any device.
        config: a folder needs it. A .safetensors file keeps it in its metadata, where `read_checkpoint` finds it.
            A .pth or .pt file is a plain state_dict and takes none.
        overwrite: replace the file, or these two files in a folder, whose others stay.

    Raises:
        CheckpointError: `path` exists and `overwrite` is False, its kind is not known or does not go with `config`,
            something in `state` is no dense tensor, or the disk is full. Nothing was written.
        TypeError: `config` can't be written as JSON.
        OSError: the folder can't be written to.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    is_folder = is_folder_name(path)
    _check_target(path, is_folder, config is not None, overwrite)
    tensors = _dense(state)
    text = "" if config is None else json.dumps(config, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_folder:
        with written_whole(path) as fresh:
            _save(fresh, tensors, text)
    elif path.is_dir():
        _write_folder(path, tensors, text)
    else:
        _write_new_folder(path, tensors, text, overwrite)
    sync(path.parent)


def _write_new_folder(path: Path, tensors: dict[str, Tensor], config: str, overwrite: bool) -> None:
    try:
        with written_whole(path) as fresh:
            fresh.mkdir()
            _write_folder(fresh, tensors, config)
    except OSError:
        if not path.is_dir():
            raise
        # Another process was first: as if it had been there from the start.
        _check_target(path, True, True, overwrite)
        _write_folder(path, tensors, config)


def _write_folder(folder: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Write the two files into a folder that is there; both are complete before the first one gets its name."""
    with written_whole(folder / CONFIG) as about, written_whole(folder / WEIGHTS) as weights:
        _save(weights, tensors, "")
        about.write_text(config + "\n", encoding="utf-8")
        sync(about)
    sync(folder)


def is_folder_name(path: Path) -> bool:
    """Whether it is a folder's, which has no ending; nor has "vit-v1.5". Raises CheckpointError for unknown endings."""
    suffix = path.suffix.lower()
    if suffix[1:2].isalpha() and suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(f"{path}: unknown kind of file {suffix!r}; {ACCEPTED}")
    return not suffix[1:2].isalpha()


def _check_target(path: Path, is_folder: bool, has_config: bool, overwrite: bool) -> None:
    if is_folder and not has_config:
        raise CheckpointError(f"{path}: a folder can't be written without a config; {ACCEPTED}")
    if has_config and path.suffix.lower() in TORCH_SUFFIXES:
        raise CheckpointError(f"{path}: a {path.suffix} file can't hold a config; {ACCEPTED}")
    if path.is_dir():
        if not is_folder:
            raise CheckpointError(f"{path}: is a folder; {ACCEPTED}")
        for name in (WEIGHTS, CONFIG):
            if (path / name).is_dir():
                raise CheckpointError(f"{path / name}: is a folder and would have to be replaced by a file")
        taken = any(path.iterdir())
    else:
        taken = os.path.lexists(path)
        if taken and is_folder:
            raise CheckpointError(f"{path}: is a file; {ACCEPTED}")
    if taken and not overwrite:
        raise CheckpointError(f"{path}: exists already; it is replaced only where overwrite is asked for")


def _dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, which neither format could keep apart or would write in full."""
    if not state:
        raise CheckpointError("state: empty; expected names and tensors")
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            found = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} on {value.device}"
            raise CheckpointError(f"state: {name!r} is no dense tensor ({found})")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _save(path: Path, tensors: dict[str, Tensor], config: str) -> None:
    path.touch()
    mode = path.stat().st_mode  # a new file's; safetensors lets the owner alone read what it writes
    try:
        if path.suffix.lower() in TORCH_SUFFIXES:
            torch.save(tensors, path)
        else:
            metadata = {"format": "pt", CONFIG_KEY: config} if config else {"format": "pt"}
            safetensors.torch.save_file(tensors, path, metadata=metadata)
        path.chmod(mode)
        sync(path)
    # A full disk is a RuntimeError of torch's, a SafetensorError of safetensors'.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path.name}: can't be written: {reason[:200]}") from error
