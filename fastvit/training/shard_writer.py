"""Checkpoints in shards, written by all processes while the run goes on: a folder is there whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import checkpoint

from fastvit.checkpoints.files import RUN
from fastvit.checkpoints.sharded import METADATA, reason_of
from fastvit.files import sync

from .checkpoint import save_checkpoint
from .distributed import Team
from .errors import TrainingError

PARTIAL = ".partial-"
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
        self._written: Future[Any] | None = None
        self._failure: Exception | None = None
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
        self.finish()
        partial = self.output / f"{PARTIAL}{name}"
        if self.team.is_first:
            save_checkpoint(partial / RUN, note)
        writer = checkpoint.FileSystemWriter(partial)
        written = checkpoint.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)  # what was copied is there
        self._written = written
        if self.team.is_first:
            written.add_done_callback(lambda written: self._publish(written, partial, name, best))

    def finish(self) -> None:
        """Wait for what is being written. Raises TrainingError, in every process, where it could not be."""
        if self._written is None:
            return
        written, self._written = self._written, None
        try:
            written.result()
        except Exception as error:  # one of torch's own that holds those of all processes
            self._failure = error
        failures = [found for found in self.team.gather(self._failure and reason_of(self._failure)) if found]
        self._failure = None
        if failures:
            raise TrainingError(f"{self.output}: a checkpoint can't be written ({failures[0]}); older ones are whole")

    def _publish(self, written: Future[Any], partial: Path, name: str, best: str) -> None:
        """In the background thread of the first process."""
        try:
            if written.exception() is not None:
                shutil.rmtree(partial, ignore_errors=True)
                return
            sync(partial)
            final = self.output / name
            if final.exists():  # of a run that was resumed from an earlier checkpoint
                older = self.output / f"{PARTIAL}older-{name}"
                os.replace(final, older)
                shutil.rmtree(older, ignore_errors=True)
            os.replace(partial, final)
            sync(self.output)
            for old in folders_in(self.output)[: -self.keep]:
                if old.name != best:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            self._failure = error
