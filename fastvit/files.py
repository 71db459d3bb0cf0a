"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["sync", "written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A free path of the same name, for the block to write a file or a folder to; it becomes `path` at the end.

    Where the block raises, `path` stays as it was and nothing is left behind. Processes that write the same path at
    once do not disturb each other: the last to end has its file there. Permissions are those of a new file, whatever
    was there; a link is replaced, not followed. A folder can take the place of an empty one, but not of a full one.
    A crash of the machine may leave a part, unless the block calls `sync` on what it wrote.

    Raises:
        FileNotFoundError: the folder of `path` is missing, or the block wrote nothing.
        OSError: that folder can't be written to, or `path` is a folder and what was written is a file.
    """
    # A folder rather than a name beside `path`: torch.save puts the name of the file into the file. And in the folder
    # of `path`, since nothing can be renamed from one file system to another.
    with TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        fresh = Path(folder) / path.name
        yield fresh
        os.replace(fresh, path)


def sync(path: Path) -> None:
    """Bring the contents of a file, or the names in a folder, to the disk."""
    if os.name != "posix":  # a folder can't be opened elsewhere
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
