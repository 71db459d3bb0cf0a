"""Imports of libraries that FastViT is compared with; none of them is needed to use it."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

# torchvision's wheel registers its compiled operators only beside the torch build it was made for. Its models, and
# the libraries that import it, do without them: declaring the two names it looks up is enough beside a CPU torch.
_TORCHVISION_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def _declare_torchvision_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _TORCHVISION_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


@lru_cache
def import_peer(name: str) -> ModuleType:
    """A module of timm, torchvision or transformers, also beside a CPU build of torch.

    Args:
        name: "timm", or a module inside, such as "torchvision.models.vision_transformer".

    Raises:
        ImportError: it is not installed or can't be imported; the message says why.
    """
    try:
        if torch.version.cuda is None and not _declared:
            _declare_torchvision_operators()
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(f"{name.partition('.')[0]} can't be imported: {error}") from error


def import_timm() -> ModuleType:
    """timm; raises as `import_peer`."""
    return import_peer("timm")


def timm_missing() -> str:
    """Why timm can't be used here, "" if it can."""
    return peer_missing("timm")


def peer_missing(name: str) -> str:
    """Why a library can't be used here, "" if it can."""
    try:
        import_peer(name)
    except ImportError as error:
        return str(error)
    return ""
