"""Checkpoints of Vision Transformers: read any library's, convert between them, say what a file is."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from .inspection import Inspection, inspect
    from .loading import convert, load_pretrained

__all__ = ["CheckpointError", "Inspection", "convert", "inspect", "load_pretrained"]

_LAZY = {"convert": "loading", "load_pretrained": "loading", "inspect": "inspection", "Inspection": "inspection"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
