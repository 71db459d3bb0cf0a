"""The processes of a run. `torchrun` starts them and says so in the environment; without it there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import OptionError, TrainingError


@dataclass(frozen=True)
class Team:
    """This process among those of the run. Only the first one prints and writes files."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_world: int = 1  # processes on this machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gradients(self, forward: Any, *, are_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a part of a step: only the last one's gradients are averaged."""
        if hasattr(forward, "set_requires_gradient_sync"):  # FSDP2
            forward.set_requires_gradient_sync(are_last)
            return nullcontext()
        return nullcontext() if self.world == 1 or are_last else forward.no_sync()

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """A value from every process, in the order of their ranks."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_team(device: str, *, always: bool = False) -> Iterator[Team]:
    """Join the processes that torchrun started, or be one alone, with `always` in a process group all the same.

    Args:
        device: auto, cpu, cuda or cuda:N.
    """
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and not always:
        yield Team(chosen)
        return
    if not dist.is_available():
        raise TrainingError("this build of torch has no torch.distributed; run in one process, with --shard none")
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    try:
        # Gloo beside NCCL: objects and checkpoints go from memory to memory of the processors.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, **_meeting_place(world, local_world))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"can't join the other processes ({' '.join(str(error).split())[:300]})") from error
    try:
        yield Team(chosen, dist.get_rank(), world, local_world)
    finally:
        dist.destroy_process_group()


def _meeting_place(world: int, local_world: int) -> dict[str, Any]:
    """The store by which processes find each other."""
    if world == 1:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    store, rank, _ = next(dist.rendezvous("env://"))
    # torchrun keeps one store for all restarts, where the addresses of processes that are gone would be found. Only on
    # one machine do all processes count the same restarts.
    if local_world == world:
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return {"store": store, "rank": rank, "world_size": world}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; auto is a GPU where there is one. Raises OptionError where it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["auto", "cpu", *["cuda"] * (count > 0), *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise OptionError("device", name, "one of " + ", ".join(known) + ("" if count else " (no GPU found)"))
    if name == "cpu" or not count:
        return torch.device("cpu")
    index = int(name[5:]) if name.startswith("cuda:") else local_rank
    if index >= count:
        raise OptionError("device", name, f"at most {count} processes on this machine, one a GPU")
    return torch.device("cuda", index)
