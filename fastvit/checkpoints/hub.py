"""A name on the Hugging Face hub: told from a path, and fetched."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError
from .formats import FOLDER_WEIGHTS

_PREFIXES = ("hf-hub:", "hf_hub:", "hf://")
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# What a file is called that was meant by "folder/file".
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".json", ".ckpt")

# The first that has weights: a repository often holds the same ones several times.
_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)


def hub_name(source: str) -> str:
    """`source` as "owner/name" or "owner/name@revision" where it can be a name on the hub, else ""."""
    for prefix in _PREFIXES:
        if source.startswith(prefix):
            return source.removeprefix(prefix)
    return source if _NAME.fullmatch(source) and not source.endswith(_FILE_SUFFIXES) else ""


def download(name: str) -> Path:
    """The folder with config.json and the weights of `name`, from the hub or from its cache.

    Raises:
        CheckpointError: the name is no name, is not there, or neither hub nor cache has it within reach.
        ImportError: huggingface_hub is not installed.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name}: not a name on the hub; accepted is owner/name or owner/name@revision")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ImportError(f"{name}: a name on the hub needs huggingface_hub (pip install huggingface_hub)") from error
    repository, _, revision = name.partition("@")
    for weights in _WEIGHTS:
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
