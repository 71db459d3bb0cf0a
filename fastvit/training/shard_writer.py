"""Checkpoints in shards, written by all processes while the run goes on: a folder is there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastvit.checkpoints.files import RUN
from fastvit.checkpoints.sharded import METADATA
from fastvit.files import sync

from .checkpoint import save_checkpoint, unwritten
from .distributed import Team
from .failures import SharedError

PARTIAL = ".partial-"
ASIDE = ".before"  # behind the names of checkpoints of a run that was begun again from an earlier one
KEPT = 2  # checkpoints, where nobody says how many
PATIENCE = 60  # seconds for a checkpoint to be written whose run has failed
_NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{6,}))?")  # of so many epochs, and so many steps of the next one


def folder_name(epoch: int, step: int) -> str:
    return f"epoch-{epoch:04}" + (f"-step-{step:06}" if step else "")


def folders_in(output: Path) -> list[Path]:
    """The checkpoints of a run that are whole, from the first to the last."""
    found = []
    for path in output.iterdir() if output.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / METADATA).is_file() and (path / RUN).is_file():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for _, _, path in sorted(found)]


class ShardWriter:
    """Writes one checkpoint at a time, in the background.

    The tensors are copied when `save` is called and written after it has returned, into a folder with a name of its
    own. Once every process has its shards on the disk, the first one gives it its name and removes older ones.
    """

    def __init__(self, output: Path, team: Team, keep: int) -> None:
        self.output, self.team, self.keep = output, team, keep
        # Of its own: the background thread's messages must not meet those of the run.
        self._group = dist.new_group(backend="gloo")
        self._done: Future[str] | None = None  # with what went wrong
        if team.is_first:
            output.mkdir(parents=True, exist_ok=True)
            for left_over in output.glob(f"{PARTIAL}*"):  # of a run that was killed
                shutil.rmtree(left_over, ignore_errors=True)
        team.wait()

    def save(self, name: str, note: dict[str, Any], tensors: dict[str, Any], *, best: str) -> None:
        """Write OUTPUT/`name`. Every process must call.

        Args:
            note: all that is no tensor of the model.
            tensors: shards, in dictionaries inside each other.
            best: name of the checkpoint that is kept whatever its age.
        """
        from torch.distributed import checkpoint  # which takes seconds, that a bad option would wait for

        self.finish()
        fresh = self._partial(name)
        if self.team.is_first:
            save_checkpoint(fresh / RUN, note)
        writer = checkpoint.FileSystemWriter(fresh)
        written = checkpoint.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)  # what was copied is there
        self._done = Future()  # a future's callbacks run behind those who wait for it: they wait for this one
        written.add_done_callback(partial(self._end, self._done, self.output / name, best))

    def finish(self) -> None:
        """Wait for what is being written. Raises SharedError, in every process, where it could not be."""
        if self._done is None:
            return
        failure, self._done = self._done.result(), None
        failures = [found for found in self.team.gather(failure) if found]
        if failures:
            raise SharedError(f"{self.output}: a checkpoint can't be written ({failures[0]}); older ones are whole")

    def settle(self) -> None:
        """Let what is being written come to its end before the run ends with an error; the others may be gone."""
        if self._done is not None:
            wait([self._done], PATIENCE)

    def _end(self, done: Future[str], final: Path, best: str, written: Future[Any]) -> None:
        """In the background thread."""
        failure = "" if (error := written.exception()) is None else unwritten(error)
        try:
            if self.team.is_first:
                self._publish(final, best, is_whole=not failure)
        except Exception as error:  # whatever it is: `finish` waits for this thread
            failure = unwritten(error)
        done.set_result(failure)

    def _publish(self, final: Path, best: str, *, is_whole: bool) -> None:
        fresh = self._partial(final.name)
        if not is_whole:
            shutil.rmtree(fresh, ignore_errors=True)
            return
        sync(fresh)
        if final.exists():  # of a run that was resumed from an earlier checkpoint
            self._remove(final)
        os.replace(fresh, final)
        sync(self.output)
        whole = folders_in(self.output)
        place = whole.index(final)
        for later in whole[place + 1 :]:  # of a run that went on from an earlier checkpoint than its last one
            aside = later.with_name(f"{later.name}{ASIDE}")
            if aside.exists():
                self._remove(aside)
            os.replace(later, aside)
        for old in whole[: place + 1][: -self.keep]:
            if old.name != best:
                self._remove(old)

    def _remove(self, folder: Path) -> None:
        """Without its name first: a process that is killed leaves no part of a checkpoint that looks whole."""
        older = self._partial(f"older-{folder.name}")
        os.replace(folder, older)
        shutil.rmtree(older, ignore_errors=True)

    def _partial(self, name: str) -> Path:
        return self.output / f"{PARTIAL}{name}"
