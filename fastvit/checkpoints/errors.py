"""The error of checkpoints, and what its messages share."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint that can't be read, recognised, fitted or written; the message names it and says why."""


def listed(names: Sequence[str], shown: int = 6, by: str = ", ") -> str:
    """The first of `names`, and how many more there are."""
    return by.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
