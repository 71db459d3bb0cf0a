"""An exponential moving average of a model's parameters, which often classifies better than they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARMUP_POWER = 2 / 3  # timm's default


class Ema:
    """The average, as timm's ModelEmaV3 has it, but without a second model: sharded parameters can't be deep-copied.

    Attributes:
        values: of each parameter by name, of its shape, dtype, device and sharding.
        updates: how many steps of the optimizer are in it.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    def decay_at(self, update: int) -> float:
        """Of the update of this number, from 1: none of the values before the first step is kept."""
        if update <= 1:
            return 0.0
        return min(self.decay, 1 - update**-WARMUP_POWER) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters after a step of the optimizer."""
        self.updates += 1
        parameters = dict(model.named_parameters())
        now = [parameters[name].detach() for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), now, 1 - self.decay_at(self.updates))

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """`model` with the average as its parameters, and the average with theirs; both are as before at the end."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(kept)
