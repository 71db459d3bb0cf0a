"""Other libraries in the tests: what needs one that can't be imported is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fastvit.peers import import_peer, peer_missing


@contextmanager
def skipped_without_library() -> Iterator[None]:
    """Around what imports one."""
    try:
        yield
    except ImportError as error:
        pytest.skip(str(error))


def peer(name: str) -> Any:
    """A module of another library."""
    with skipped_without_library():
        return import_peer(name)


def needs(library: str) -> pytest.MarkDecorator:
    """The mark of a test."""
    reason = peer_missing(library)
    return pytest.mark.skipif(bool(reason), reason=reason or f"{library} is there")
