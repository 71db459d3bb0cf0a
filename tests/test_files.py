"""What is written appears whole or not at all: the helper itself, and everything in the package that promises it."""

from __future__ import annotations

import functools
import importlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastvit.benchmarks.rows import Row, write_json_lines
from fastvit.checkpoints import CheckpointError
from fastvit.checkpoints.writing import write_checkpoint
from fastvit.files import sync, written_whole
from fastvit.pages import write_page
from fastvit.plots import new_figure, save
from fastvit.training.checkpoint import save_checkpoint
from fastvit.tuning import Table


class Writer(NamedTuple):
    """Something that writes a file, or a folder, of this name. Another `number` makes other contents."""

    name: str
    write: Callable[[Path, int], Any]
    works_through: str  # the function that fills the file, as module:name
    makes_folders: bool = True  # that are missing above the file


def write_picture(path: Path, number: int) -> None:
    figure, axes = new_figure(1, 1, (2, 2))
    axes[0][0].plot([0, number])
    save(figure, path)


def write_weights(path: Path, number: int) -> None:
    config = {"number": number} if path.name == "folder" else None
    write_checkpoint(path, {"w": torch.full((100,), float(number))}, config, overwrite=True)


TEXT = "pathlib:Path.write_text"
WRITERS = [
    Writer("page.html", lambda path, number: write_page(path, "Title", f"<p>{number}</p>"), TEXT, False),
    Writer("picture.png", write_picture, "matplotlib.figure:Figure.savefig", False),
    Writer("table.json", lambda path, number: Table("device", {"torch": str(number)}).save(path), TEXT),
    Writer("rows.jsonl", lambda path, number: write_json_lines([Row(str(number), *"abcde")] * 9, path), TEXT),
    Writer("last.pt", lambda path, number: save_checkpoint(path, {"model": number}), "torch:save"),
    Writer("w.pth", write_weights, "torch:save"),
    Writer("w.safetensors", write_weights, "safetensors.torch:save_file"),
    Writer("folder", write_weights, TEXT),  # the second of its two files
]
writers = pytest.mark.parametrize("writer", WRITERS, ids=[writer.name for writer in WRITERS])
old_or_new = pytest.mark.parametrize("there", [True, False], ids=["over an old one", "new"])


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden or not."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def replace_filling(monkeypatch: pytest.MonkeyPatch, writer: Writer, filling: Callable[..., Any]) -> None:
    """Call `filling(original, *arguments)` in place of the function that fills the writer's file."""
    module, _, name = writer.works_through.partition(":")
    *classes, name = name.split(".")
    owner = functools.reduce(getattr, classes, importlib.import_module(module))
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **named: filling(original, *arguments, **named))


@pytest.fixture
def umask() -> Iterator[int]:
    """One with which a new file has permissions that are nobody's default."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


# Everything that promises it


@writers
@old_or_new
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_write_that_ends_in_the_middle_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Writer, there: bool, error: BaseException
) -> None:
    path = tmp_path / writer.name
    if there:
        writer.write(path, 1)
    before = tree(tmp_path)

    def write_half(original: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        file = next(value for value in arguments if isinstance(value, Path) or hasattr(value, "fileno"))
        if isinstance(file, Path):
            file.write_bytes(b"half")
        else:
            file.write(b"half")
        raise error

    replace_filling(monkeypatch, writer, write_half)
    with pytest.raises((CheckpointError, type(error))):
        writer.write(path, 2)
    assert tree(tmp_path) == before


@writers
@old_or_new
def test_a_rename_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Writer, there: bool
) -> None:
    if there:
        writer.write(tmp_path / writer.name, 1)
    before = tree(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((CheckpointError, OSError), match="no space left"):
        writer.write(tmp_path / writer.name, 2)
    assert tree(tmp_path) == before


@writers
def test_what_is_there_is_replaced_and_nothing_else_is_left(tmp_path: Path, writer: Writer) -> None:
    writer.write(tmp_path / writer.name, 1)
    first = tree(tmp_path)
    writer.write(tmp_path / writer.name, 2)
    second = tree(tmp_path)
    assert first.keys() == second.keys() and first != second
    assert {name.partition("/")[0] for name in second} == {writer.name}


@writers
def test_two_writers_of_the_same_path_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Writer
) -> None:
    for folder in ("alone", "shared"):
        (tmp_path / folder).mkdir()
    writer.write(tmp_path / "alone" / writer.name, 1)
    path = tmp_path / "shared" / writer.name
    writer.write(path, 0)
    inside: list[bool] = []

    def another_comes(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if not inside:
            inside.append(True)
            writer.write(path, 2)
        return result

    replace_filling(monkeypatch, writer, another_comes)
    writer.write(path, 1)
    assert inside and tree(tmp_path / "shared") == tree(tmp_path / "alone")


@writers
@old_or_new
def test_permissions_are_those_of_a_new_file(tmp_path: Path, umask: int, writer: Writer, there: bool) -> None:
    path = tmp_path / writer.name
    if there:
        writer.write(path, 1)
        for file in tmp_path.rglob("*.*"):
            file.chmod(0o604)
    writer.write(path, 2)
    modes = {stat.S_IMODE(found.stat().st_mode) for found in tmp_path.rglob("*") if found.is_file()}
    assert modes == {0o666 & ~umask}
    if path.is_dir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


@writers
def test_a_missing_folder_is_made_or_refused(tmp_path: Path, writer: Writer) -> None:
    path = tmp_path / "new" / "deep" / writer.name
    if writer.makes_folders:
        writer.write(path, 1)
        assert path.exists()
    else:
        with pytest.raises(FileNotFoundError):
            writer.write(path, 1)
        assert tree(tmp_path) == {}


# The helper


def test_a_block_writes_to_a_path_of_the_same_name_in_the_same_file_system(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with written_whole(path) as fresh:
        assert fresh.name == path.name and fresh != path and not fresh.exists()
        assert fresh.is_relative_to(tmp_path) and fresh.parent.stat().st_dev == tmp_path.stat().st_dev
        fresh.write_bytes(b"new")
        assert not path.exists()
    assert tree(tmp_path) == {"file.txt": b"new"}


def test_a_block_that_wrote_nothing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "file"):
        pass
    assert tree(tmp_path) == {"file": b"old"}


def test_a_folder_takes_an_empty_place_and_no_full_one(tmp_path: Path) -> None:
    for old in ({}, {"theirs": b"old"}):
        path = tmp_path / f"folder{len(old)}"
        path.mkdir()
        for name, data in old.items():
            (path / name).write_bytes(data)

        def write(path: Path = path) -> None:
            with written_whole(path) as fresh:
                fresh.mkdir()
                (fresh / "ours").write_bytes(b"new")

        if old:
            with pytest.raises(OSError):
                write()
        else:
            write()
        assert tree(path) == (old or {"ours": b"new"})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_takes_no_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError), written_whole(tmp_path / "taken") as fresh:
        fresh.write_bytes(b"new")
    assert tree(tmp_path) == {"taken": None}


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    with written_whole(tmp_path / "link") as fresh:
        fresh.write_bytes(b"new")
    assert tree(tmp_path) == {"link": b"new", "target": b"old"} and not (tmp_path / "link").is_symlink()


def test_a_name_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with written_whole(Path("file")) as fresh:
        fresh.write_bytes(b"new")
    assert tree(tmp_path) == {"file": b"new"}


_WRITE_OFTEN = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path, data = Path(sys.argv[2]), sys.argv[3].encode() * 100_000
for _ in range(300):
    with files.written_whole(path) as fresh:
        fresh.write_bytes(data)
    assert len(set(path.read_bytes())) == 1 and path.stat().st_size == len(data)
"""


def test_processes_that_write_the_same_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITE_OFTEN, sys.modules["fastvit.files"].__file__ or "", str(tmp_path / "file")]
    processes = [subprocess.Popen([*command, letter], stderr=subprocess.PIPE, text=True) for letter in "ab"]
    outputs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_sync_takes_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"new")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    for path in (tmp_path / "file", tmp_path):
        sync(path)
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")
