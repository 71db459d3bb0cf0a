"""The processes of a run. `torchrun` starts them and says so in the environment; without it there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather_bytes(self, state: Tensor) -> list[Tensor]:
        """A CPU uint8 tensor of one size from every process, in the order of their ranks."""
        if self.world == 1:
            return [state]
        moved = state.to(self.device)
        parts = [torch.empty_like(moved) for _ in range(self.world)]
        dist.all_gather(parts, moved)
        return [part.cpu() for part in parts]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_team(device: str) -> Iterator[Team]:
    """Join the processes that torchrun started, or be one alone. `device`: auto, cpu, cuda or cuda:N."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Team(chosen)
        return
    if not dist.is_available():
        raise TrainingError("this build of torch has no torch.distributed; run without torchrun")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Team(chosen, rank, world)
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; auto is a GPU where there is one. Raises OptionError where it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    known = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise OptionError("device", name, "one of " + ", ".join(known) + ("" if count else " (no GPU found)"))
    index = local_rank if name == "cuda" else int(name.split(":")[1])
    if index >= count:
        raise OptionError("device", name, f"at most {count} processes on this machine, one a GPU")
    return torch.device("cuda", index)
