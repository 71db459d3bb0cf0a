"""What a call comes to before anything runs: its launches, and the bytes they read and write, counted.

Launchers are run on tensors without storage, and every launch is noted in place of being made. Each file of launchers
declares the calls that stand for its op, as `CALLS`: functions that make one, by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit.discovery import Declared
from fastvit.kernels import launch
from fastvit.kernels.manifest import Entry

# Ops of PyTorch that launch nothing.
FREE = frozenset(
    "empty empty_like empty_strided new_empty view select slice detach alias expand permute as_strided unbind "
    "split_with_sizes".split()
)


@dataclass
class Call:
    """One call of an op, as its launchers make it."""

    name: str
    launches: list[Entry] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # PyTorch's own kernels around them
    bytes: int = 0  # of tensors that launches read or write, each counted once a launch

    def cells(self) -> tuple[Any, ...]:
        """A line of a table."""
        kernels = ", ".join(entry.kernel for entry in self.launches)
        return self.name, len(self.launches), len(self.others), f"{self.bytes / 1e6:.1f}", kernels

    def note(self, entry: Entry, grid: tuple[int, ...], *, reads: Any = (), **arguments: Any) -> None:
        """In place of a launch."""
        self.launches.append(entry)
        tensors = [value for value in (*arguments.values(), *reads) if isinstance(value, Tensor)]
        self.bytes += sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


class _Others(TorchDispatchMode):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_of_host = isinstance(found, Tensor) and found.device.type == "cpu"
        if name not in FREE and not is_of_host:
            self.call.others.append(name)
        return found


def count(name: str, make: Callable[[], object]) -> Call:
    """Count one call; `make` is to use tensors of the device "meta"."""
    call = Call(name)
    with mock.patch.object(launch, "launch", call.note), _Others(call):
        make()
    return call


def counted() -> Iterator[Call]:
    """Every call that is declared, counted."""
    declared: Declared[Mapping[str, Callable[[], object]]] = Declared("fastvit.kernels", "CALLS")
    for calls in declared.values():
        for name, make in calls.items():
            yield count(name, make)
