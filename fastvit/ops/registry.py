"""What the registrations share: the library, and the rules that hold for every op."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastvit", "DEF")
NAMESPACE = "fastvit"
PLAIN = (Tensor, torch.nn.Parameter)


def define(schema: str, run: Callable, fake: Callable) -> Any:
    """Register an op: its schema, the function that runs it on any device, and its fake for tracing.

    Batching over it raises: a batch is what the ops already work on, and torch's fallback would loop in silence.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _no_vmap(name), lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _no_vmap(name: str) -> Callable:
    def refuse(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise RuntimeError(
            f"fastvit::{name} can't be used under torch.vmap (per-sample gradients included): "
            "it works on batches itself; give it the whole batch, or use backend='reference'"
        )

    return refuse


def once_differentiable(name: str) -> None:
    """Make a backward op refuse a second derivative, instead of returning zeros without a word."""

    def refuse(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"fastvit::{name} has no derivative: second derivatives need backend='reference'")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse, lib=LIBRARY)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The precision of an op is in its arguments: autocast, still on around it, must not change what runs inside."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call without gradients may skip the dispatcher, which would only hand it on: half of its cost.

    It may not where something watches or transforms ops: a compiler, a tracer, a mode, a profiler, tensors of a class
    of their own or without data.
    """
    if torch.compiler.is_compiling():
        return False
    core = torch._C
    if (
        core._len_torch_dispatch_stack()
        or core._len_torch_function_stack()
        or core._get_tracing_state() is not None
        or core._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_meta):
            return False
    return True
