"""Checkpoints of Vision Transformers: read any library's, convert between them, say what a file is."""

from __future__ import annotations

from .errors import CheckpointError
from .inspection import Inspection, inspect
from .loading import convert, load_pretrained

__all__ = ["CheckpointError", "Inspection", "convert", "inspect", "load_pretrained"]
