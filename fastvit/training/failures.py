"""One error in words, from the first process, whichever process met it; and then all of them end.

A process that fails leaves the others waiting for it in the next exchange. So it tells the first process, by the store
where the processes met, which prints what happened and ends; torchrun, or the broken connections, end the rest.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from .distributed import Team
from .errors import TrainingError, UserError

TOLD, HEARD = "fastvit/told", "fastvit/heard"
EVERY = 0.5  # seconds between two looks of the first process
PATIENCE = 20  # seconds for the first process to say it and end
# What a broken connection is called by gloo, NCCL and the store.
_LOST = ("gloo", "nccl", "connection", "peer", "broken pipe", "socket", "store")


class ToldError(UserError):
    """The error was told by the first process: nothing is left to say."""


class SharedError(TrainingError):
    """An error that every process raises alike."""


@contextmanager
def told_by_the_first(team: Team, describe: Callable[[Exception], str]) -> Iterator[None]:
    """Around all that processes do together. `describe` makes a line of an error that a user can mend."""
    if team.world == 1:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    speaking, ended = threading.Lock(), threading.Event()
    if team.is_first:
        threading.Thread(target=_listen, args=(store, speaking, ended), daemon=True).start()
    try:
        yield
    except Exception as error:
        if not team.is_first:
            _tell(store, team, error, describe)
            raise ToldError("told by the first process") from error
        speaking.acquire()  # for good: the other thread says no more
        if _is_lost(error):
            raise SharedError("another process of the run has ended, or can't be reached any more") from error
        raise
    finally:
        ended.set()


def _listen(store: Any, speaking: threading.Lock, ended: threading.Event) -> None:
    """In a thread of the first process, whose main one may wait for ever for the process that failed."""
    while not ended.wait(EVERY):
        if _try(store.check, [TOLD]):
            text = store.get(TOLD).decode()
            speaking.acquire()
            sys.stdout.flush()
            print(text, file=sys.stderr, flush=True)
            _try(store.set, HEARD, "")
            os._exit(2)


def _tell(store: Any, team: Team, error: Exception, describe: Callable[[Exception], str]) -> None:
    """Tell what the first process can't know, and wait for it to end: who ends before it has spoken, ends all."""
    if not (isinstance(error, SharedError) or _is_lost(error)):
        is_user_s = isinstance(error, (ValueError, OSError, ImportError))
        text = describe(error) if is_user_s else "".join(traceback.format_exception(error))
        if _try(store.add, f"{TOLD}/count", 1) == 1:  # the first of several that fail at once
            _try(store.set, TOLD, f"error: process {team.rank} of {team.world}: {text}")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and _try(store.check, [HEARD]) is False:
        time.sleep(EVERY)


def _is_lost(error: BaseException) -> bool:
    is_torch_s = isinstance(error, RuntimeError) and not isinstance(error, UserError)
    return is_torch_s and any(word in str(error).lower() for word in _LOST)


def _try(call: Callable[..., Any], *arguments: Any) -> Any:
    """None where the store has gone with its process."""
    try:
        return call(*arguments)
    except Exception:
        return None


def check_agreement(team: Team, what: dict[str, Any]) -> None:
    """Raise, in every process, where one has other facts than the first."""
    every = team.gather(what)
    for rank, facts in enumerate(every):
        differing = [name for name in every[0] if facts.get(name) != every[0][name]]
        if differing:
            name = differing[0]
            raise SharedError(f"process {rank} has {name} {facts.get(name)!r}, the first one {every[0][name]!r}")
