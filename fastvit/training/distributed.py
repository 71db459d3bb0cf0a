"""The processes of a run. `torchrun` starts them and says so in the environment; without it there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import OptionError, TrainingError


@dataclass(frozen=True)
class Team:
    """This process among those of the run. Only the first one prints and writes files."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over all processes."""
        return model if self.world == 1 else nn.parallel.DistributedDataParallel(model)

    def gradients(self, forward: Any, *, are_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a part of a step: only the last one's gradients are averaged."""
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
def join_team(device: str) -> Iterator[Team]:
    """Join the processes that torchrun started, or be one alone. `device`: auto, cpu, cuda or cuda:N."""
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Team(chosen)
        return
    if not dist.is_available():
        raise TrainingError("this build of torch has no torch.distributed; run without torchrun")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Team(chosen, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


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
