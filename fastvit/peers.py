"""Imports of libraries that FastViT is compared with; none of them is needed to use it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import lru_cache
from types import ModuleType

import torch

_IMPORT_TORCHVISION = ("timm", "torchvision", "transformers")  # the last when it needs it, long after its own import


@lru_cache
def import_peer(name: str) -> ModuleType:
    """A module of timm, torchvision or transformers, also where torchvision's wheel is of another build than torch.

    Args:
        name: "timm", or a module inside, such as "torchvision.models.vision_transformer".

    Raises:
        ImportError: it is not installed or can't be imported; the message says why.
    """
    try:
        if name.partition(".")[0] in _IMPORT_TORCHVISION and importlib.util.find_spec("torchvision") is not None:
            _import_torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(f"{name.partition('.')[0]} can't be imported: {error}") from error


def _import_torchvision() -> None:
    """Import torchvision, without its compiled operators where those are of another build than torch.

    It looks up two of them by name while it is imported, and its models do without. Names that stand in for them until
    then are enough. A torchvision that fits its torch meets no stand-in, and neither does one that is loaded later.
    """
    before = set(sys.modules)
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        if "torchvision::nms does not exist" not in str(error):
            return  # whoever needs it will say what it is
        for half in [found for found in sys.modules if found.partition(".")[0] == "torchvision"]:
            if half not in before:
                del sys.modules[half]
        stand_in = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            stand_in.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        try:
            importlib.import_module("torchvision")
        finally:
            stand_in._destroy()


def peer_missing(name: str) -> str:
    """Why a library can't be used here, "" if it can."""
    try:
        import_peer(name)
    except ImportError as error:
        return str(error)
    return ""
