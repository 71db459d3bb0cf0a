"""One file of weights: what it is, told by its first bytes, and its contents. No code from a file is ever run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from .errors import CheckpointError
from .pickles import LEGACY_TORCH, read_torch

# The files of a model's folder; the first kind of weights that is there is taken.
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FOLDER_WEIGHTS = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

CONFIG_KEY = "config"  # where a .safetensors file that stands alone keeps its config, among the metadata

# First bytes of what is offered as a checkpoint and is none that can be read.
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, without the weights themselves; fetch them with `git lfs pull`",
    b"\x89HDF": "HDF5 (Keras, TensorFlow)",
    b"GGUF": "GGUF",
    b"\x93NUMPY": "a single NumPy array",
    b"\x1f\x8b": "a gzip archive",
}
_PAGES = (b"<!", b"<html", b"<head", b"<?xml", b'{"', b"entry not found", b"not found")  # in lower case
_ACCEPTED = "accepted are .safetensors, .pth or .pt (torch.save) and .npz (JAX)"
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit


def read_file(path: Path, allow: Sequence[str] = ()) -> tuple[str, Any, dict[str, Any] | None]:
    """What a file is ("safetensors", "torch" or "npz", whatever its name ends in), its contents and its config.

    Args:
        allow: full names of classes whose objects a torch file may have.

    Raises:
        CheckpointError: none of these, empty, cut off or damaged, or with Python objects in it.
    """
    kind = _kind(path)
    if kind == "safetensors":
        return kind, *_read_safetensors(path)
    return kind, _read_npz(path) if kind == "npz" else read_torch(path, allow), None


def _kind(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise CheckpointError(f"{path}: an empty file")
    for magic, meaning in _FOREIGN.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {meaning}; {_ACCEPTED}")
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(_PAGES):
        raise CheckpointError(f"{path}: a web page or a server's answer; the download went wrong; {_ACCEPTED}")
    if start.startswith(b"PK"):
        return _kind_of_zip(path, size)
    if start.startswith(LEGACY_TORCH):
        return "torch"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and not LEGACY_TORCH.startswith(start):
        raise CheckpointError(
            f"{path}: a pickle that torch.save did not write; unpickling may run code, so it is not read; {_ACCEPTED}"
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    raise CheckpointError(f"{path}: not a checkpoint, or damaged ({size} bytes); {_ACCEPTED}")


def _kind_of_zip(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # BadZipFile, NotImplementedError (a version that can't be), OSError …
        reason = f"truncated or damaged ({size} bytes, the end of the archive is missing)"
        raise CheckpointError(f"{path}: {reason}") from error
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: a TorchScript program, which is code; save its state_dict() instead")
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    raise CheckpointError(f"{path}: a zip archive without weights; {_ACCEPTED}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Names and CPU tensors of a .safetensors file, and the config in its metadata where it has one."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    # SafetensorError derives from Exception alone, and what else is raised differs by version.
    except Exception as error:
        size = path.stat().st_size
        raise CheckpointError(f"{path}: truncated or damaged ({size} bytes): {_first_line(error)}") from error
    try:  # the metadata are anybody's: what is no JSON object under that name is none of ours
        config = json.loads(metadata.get(CONFIG_KEY, ""))
    except ValueError:
        config = None
    return state, config if isinstance(config, dict) else None


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a .npz file; "/" in names stays. bfloat16, which NumPy lacks, is restored."""
    state = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                state[name] = _to_tensor(file[name], f"{path}: {name}")
    except CheckpointError:
        raise
    except Exception as error:  # ValueError, BadZipFile, zlib.error, EOFError, OSError …
        if "allow_pickle" in str(error):
            raise CheckpointError(f"{path}: it holds pickled Python objects, which are not loaded") from error
        raise CheckpointError(f"{path}: truncated or damaged: {_first_line(error)}") from error
    return state


def _to_tensor(array: np.ndarray, what: str) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "bifcu":
        raise CheckpointError(f"{what} has dtype {array.dtype}; accepted are numbers")
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(array.shape)
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise CheckpointError(f"{what} has dtype {array.dtype}, which torch lacks") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
