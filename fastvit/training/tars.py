"""Files inside a tar, opened where they lie in it: nothing is unpacked, and nothing before them is read."""

from __future__ import annotations

import functools
import io
import os
import tarfile
from pathlib import Path
from typing import IO, Literal, NamedTuple

from .errors import DataError

BLOCK = 512  # bytes of a header; one of zeros is the end of a tar
OPEN_AT_MOST = 64  # tars, in each process


class Shard(NamedTuple):
    """A tar as it was when it was indexed."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def at(cls, path: Path, descriptor: int) -> Shard:
        found = os.fstat(descriptor)
        return cls(path, found.st_size, found.st_mtime_ns)


class Member(NamedTuple):
    """A file in a shard, which opens and names itself as a path does."""

    shard: Shard
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard.path}: {self.name}"

    def open(self, mode: Literal["rb"] = "rb", /) -> IO[bytes]:
        return io.BufferedReader(_Extract(_opened(self.shard), self.start, self.size))


class _Handle(io.FileIO):
    """An open shard. It is closed when nothing reads from it any more."""

    def __del__(self) -> None:
        self.close()


@functools.lru_cache(OPEN_AT_MOST)
def _opened(shard: Shard) -> _Handle:
    handle = _Handle(shard.path)
    if Shard.at(shard.path, handle.fileno()) != shard:
        raise ValueError("the shard has changed since the run began")
    return handle


class _Extract(io.RawIOBase):
    """A part of a file. It keeps its own place, since forked processes share that of the handle."""

    def __init__(self, file: _Handle, start: int, size: int) -> None:
        self.file, self.start, self.size, self.place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self.place))
        found = os.pread(self.file.fileno(), count, self.start + self.place)
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)


def members_of(path: Path, file: IO[bytes]) -> list[tarfile.TarInfo]:
    """All members of the tar at `path`, which is open as `file`. Raises DataError where it is not whole."""
    found: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                found.append(member)
            end = tar.offset
        # tarfile takes a damaged header for the end, unless it is the first.
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"no member and no end of the tar at byte {end:,}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        after = f" after {found[-1].name}" if found else ""
        raise DataError(f"{path}: cut off, damaged or compressed{after} ({error}); expected a whole .tar") from error
    return found
