"""`fastvit train` with a fault planted, as test_faults.py starts it: faulty.py FAULTS OPTIONS…

FAULTS: JSON, a list of {"place", "deed", "rank", "at"}, of which the one of this attempt of torchrun is planted: in
that process, at that call, counted from 1.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from fastvit.cli import main
from fastvit.training import DataError, loop, models
from fastvit.training.image_set import ImageSet
from fastvit.training.shard_writer import ShardWriter
from tests.training.runs import TINY

PLACES: dict[str, tuple[Any, str]] = {
    "step": (loop, "batch_loss"),
    "evaluation": (loop, "evaluate"),
    "save": (FileSystemWriter, "write_data"),
    "publish": (ShardWriter, "_publish"),
    "read": (ImageSet, "__getitem__"),
    "versions": (loop, "versions"),
}


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "shard")


def no_image(*_: Any) -> None:
    raise DataError("b/3.png: the image cannot be decoded (planted); mend or remove it")


def no_such_name(*_: Any) -> None:
    raise RuntimeError("a mistake of ours")


def other_versions(*_: Any) -> dict[str, str]:
    return {"fastvit": "0.0.1", "torch": torch.__version__}


DEEDS: dict[str, Callable[..., Any]] = {
    deed.__name__: deed for deed in (kill, no_space, no_image, no_such_name, other_versions)
}


def plant(place: str, deed: str, at: int = 1) -> None:
    owner, name = PLACES[place]
    call = getattr(owner, name)
    calls = 0

    def planted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != at:
            return call(*arguments, **options)
        found = DEEDS[deed](call, *arguments)
        return call(*arguments, **options) if found is None else found

    setattr(owner, name, planted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    models.DIGITS_ARGUMENTS = {**TINY, "proj_drop_rate": 0.1}
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = json.loads(sys.argv[1])
    for fault in faults[attempt : attempt + 1]:
        if os.environ["RANK"] == str(fault.pop("rank")):
            plant(**fault)
    sys.exit(main(["train", "--device", "cpu", "--no-tensorboard", "--threads", "1", *sys.argv[2:]]))
