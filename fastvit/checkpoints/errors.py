"""The error of checkpoints."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that can't be read, recognised, fitted or written; the message names it and says why."""
