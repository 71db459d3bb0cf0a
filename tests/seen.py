"""What ran: for tests that hold how something is computed, besides what comes of it."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    """The names of the ops that ran inside the `with` block, such as "aten.add.Tensor"."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(f"{func}")
        return func(*args, **(kwargs or {}))
