"""Faults planted in a backend at run time: what the validator must catch to be worth trusting.

    with planted("bias dropped", backend="cpu"):
        assert validate(backends=["cpu"]).failed

Each fault is a small, plausible mistake, declared in the file of its op. A test plants every one and expects failures
in the quantities it spoils.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit import backend as backends
from fastvit.validation.ops import OPS

Arguments = dict[str, Any]  # of a backend's function, by their names in the CPU backend
Run = Callable[[Arguments], Any]  # the backend's own function


@dataclass(frozen=True)
class Fault:
    """A mistake in an op: `forward` and `backward` are given the backend's own function and spoil it."""

    name: str
    spoils: str  # a quantity of the report in which the mistake must show
    forward: Callable[[Run, Arguments], Any] | None = None
    backward: Callable[[Run, Arguments], Any] | None = None


def faults() -> dict[str, tuple[str, Fault]]:
    """Every fault by its name, with its op."""
    return {fault.name: (op, fault) for op, known in OPS.items() for fault in known.faults}


@contextmanager
def planted(name: str, backend: str = "cpu") -> Iterator[Fault]:
    """Run the block with one of `faults` in a backend."""
    op, fault = faults()[name]
    module: Any = importlib.import_module(f"{backends._PACKAGES[backend]}.{op}")
    names = importlib.import_module(f"{backends._PACKAGES['cpu']}.{op}")
    original = module.forward, module.backward
    if fault.forward is not None:
        module.forward = _spoilt(fault.forward, module.forward, inspect.signature(names.forward))
    if fault.backward is not None:
        module.backward = _spoilt(fault.backward, module.backward, inspect.signature(names.backward))
    backends.implementation.cache_clear()
    try:
        yield fault
    finally:
        module.forward, module.backward = original
        backends.implementation.cache_clear()


def _spoilt(
    spoil: Callable[[Run, Arguments], Any], function: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., Any]:
    def run(arguments: Arguments) -> Any:
        return function(*arguments.values())

    return lambda *given: spoil(run, signature.bind(*given).arguments)


# Of several ops


def bias_dropped(run: Run, arguments: Arguments) -> Any:
    return run({**arguments, "bias": None})


def last_token_missing(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    """From the sum, which is the bias's gradient, of the gradient of packed heads."""
    d_qkv, sums = run(arguments)
    return d_qkv, sums - d_qkv[-1:, -1].sum(0).float() if sums.numel() else sums


# Of any op whose result is [B, T, D]


def last_column_wrong(run: Run, arguments: Arguments) -> Tensor:
    out = run(arguments).clone()
    out[..., -1] *= 1.25
    return out


def one_token_zeroed(run: Run, arguments: Arguments) -> Tensor:
    out = run(arguments).clone()
    out[-1:, out.shape[1] // 2] = 0
    return out


def last_token_not_written(run: Run, arguments: Arguments) -> Tensor:
    result = run(arguments)
    out = torch.empty_like(result)
    out.view(-1)[: out.numel() - out.shape[-1]] = result.reshape(-1)[: out.numel() - out.shape[-1]]
    return out
