"""What the declarations of ops share: the library, the form of a declaration, and the rules that hold for every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from fastvit.backend import count_launch, implementation

LIBRARY = torch.library.Library("fastvit", "DEF")
NAMESPACE = "fastvit"
PLAIN = (Tensor, torch.nn.Parameter)

Channels: TypeAlias = Sequence[float] | None  # a value a channel
Needs: TypeAlias = tuple[bool, bool, bool, bool]  # which of four gradients are wanted
Given: TypeAlias = Tensor | list[Tensor] | None  # for a tensor argument

# What a schema calls an argument of a declaration, by its annotation.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "Channels": "float[]?",
    "Needs": "bool[4]",
    "torch.dtype": "ScalarType",
    "bool": "bool",
    "bool | None": "bool?",
    "float": "float",
    "int": "SymInt",
    "list[int]": "SymInt[]",
    "str": "str",
}


@dataclass(frozen=True)
class Op:
    """An op, as the layers above know it."""

    name: str
    tensors: int  # so many of its arguments are tensors, or lists of them; they come first
    call: Any  # torch.ops.fastvit.NAME
    run: Callable[..., Any]  # what that runs in the end, for calls that nothing watches on the way (see `is_plain`)
    check: Callable[..., None]  # of values that are only looked at where that needs no wait
    plain: Any  # the same by PyTorch's own ops, a function; None for an op that no caller of the library's makes
    flops: Callable[..., int]  # of its products, from its arguments with shapes in the place of tensors
    gradients: Any = None  # of a context and those of the results, as `differentiate` was given it
    trained: Callable[..., Any] | None = None  # `call` with its derivative, by a shorter way; see `differentiate`

    def __call__(self, *arguments: Any) -> Any:
        """Call it by the shortest way: through torch's dispatcher only where something watches, see `is_plain`."""
        tensors = flat(arguments[: self.tensors])
        if not is_plain(*tensors):
            return self.call(*arguments)
        if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return self.run(*arguments)
        return (self.trained or self.call)(*arguments)


OPS: dict[str, Op] = {}


def _nothing_to_check(*arguments: Any) -> None:
    pass


def _no_products(call: Any) -> int:
    return 0


def define(
    name: str,
    arguments: type[Any],
    returns: str,
    fake: Callable[[Any], Any],
    *,
    run: Callable[[Any], Any] | None = None,
    check: Callable[..., None] = _nothing_to_check,
    plain: Callable[[Any], Any] | None = None,
    flops: Callable[[Any], int] = _no_products,
) -> Op:
    """Register an op.

    Batching over it raises: a batch is what the ops already work on, and torch's fallback would loop in silence.

    Args:
        arguments: a NamedTuple, the one list of what the op takes: its fields become the schema, and the functions
            below are given one. Tensors stand first, and the name of the backend, where there is one, last.
        returns: the schema's result.
        fake: the results without their values, for tracing.
        run: what it runs on any device; default: `forward`, or for a name in `_backward` `backward`, of the file of
            its name in the backend, which takes the arguments in this order.
        check: is given the arguments one by one; raises for values that don't fit, before a backend runs.
        plain: the op in terms of PyTorch's own, for exported programs and where no backend may run.
        flops: how many its products take, from shapes in the place of tensors.
    """

    def apply(function: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(arguments(*args, **kwargs))

    types = [_SCHEMA_TYPES[annotation] for annotation in _annotations(arguments)]
    listed = ", ".join(f"{kind} {field}" for kind, field in zip(types, arguments._fields, strict=True))
    LIBRARY.define(f"{name}({listed}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    runs = apply(run) if run else _run_by_backend(name, check)
    LIBRARY.impl(name, runs, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", apply(fake), lib=LIBRARY)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _no_vmap(name), lib=LIBRARY)
    tensors = sum(kind.startswith("Tensor") for kind in types)
    call = getattr(getattr(torch.ops, NAMESPACE), name)

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return flops(arguments(*args, **kwargs))

    OPS[name] = Op(name, tensors, call, runs, check, apply(plain) if plain else None, count)
    return OPS[name]


def differentiate(
    op: Op,
    arguments: type[Any],
    save: Callable[[Any, Any, Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Give an op its derivative.

    Args:
        save: is given the context, the arguments and the results, and keeps of them what the backward needs.
        gradients: is given the context and the gradients of the results; returns those of the first arguments, as
            many as can have one.
    """
    count = len(arguments._fields)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, arguments(*inputs), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, *grads)
        return (*found, *(None,) * (count - len(found)))

    torch.library.register_autograd(f"{NAMESPACE}::{op.name}", backward, setup_context=setup, lib=LIBRARY)
    if "list[Tensor]" in _annotations(arguments):
        return  # in which a function of autograd looks for no tensors

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = op.run(*inputs)
        setup(ctx, inputs, output)
        return output

    # The same without torch's dispatcher, and what it does for Python around both directions: tens of microseconds.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(op.name, (torch.autograd.Function,), methods)
    object.__setattr__(op, "gradients", gradients)
    # The class's own `apply` would look for transforms of torch.func, as `is_plain` has.
    object.__setattr__(op, "trained", super(torch.autograd.Function, function).apply)


def derivatives(
    ctx: Any, function: Callable[..., tuple[Tensor, ...]], changes: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors that the context has saved, an op's first arguments, by PyTorch's own derivatives.

    Args:
        function: the op's formulas, from these tensors to its results.
        changes: the gradients of the results.
    """
    with torch.enable_grad():
        # Views: one may have been made from others of them, whose gradients are not to count that way too.
        given = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        results = function(*given)
        changed = [(result, change) for result, change in zip(results, changes, strict=True) if change is not None]
        wanted = {
            place: tensor for place, tensor in enumerate(given) if tensor is not None and ctx.needs_input_grad[place]
        }
        found = torch.autograd.grad(
            [result for result, _ in changed],
            list(wanted.values()),
            [change for _, change in changed],
            create_graph=True,
            allow_unused=True,
        )
    gradients = dict(zip(wanted, found, strict=True))
    return tuple(gradients.get(place) for place in range(len(given)))


def _annotations(arguments: type[Any]) -> list[str]:
    """As they are written: the files of ops put off their evaluation."""
    written = (arguments.__annotations__[field] for field in arguments._fields)
    return [getattr(annotation, "__forward_arg__", annotation) for annotation in written]


def _run_by_backend(name: str, check: Callable[..., None]) -> Callable[..., Any]:
    op, is_backward = name.removesuffix("_backward"), name.endswith("_backward")

    def run(*arguments: Any) -> Any:
        check(*arguments)
        backend = arguments[-1]
        count_launch(name, backend)
        function = implementation(backend, op)[is_backward]
        device_type = arguments[0].device.type
        if torch.is_autocast_enabled(device_type):
            with torch._C._DisableAutocast():  # as below, for a tenth of its time
                return function(*arguments[:-1])
        return function(*arguments[:-1])

    return run


def _no_vmap(name: str) -> Callable:
    def refuse(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise RuntimeError(
            f"fastvit::{name} can't be used under torch.vmap (per-sample gradients included): "
            "it works on batches itself; give it the whole batch, or use backend='reference'"
        )

    return refuse


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The precision of an op is in its arguments: autocast, still on around it, must not change what runs inside."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def flat(arguments: Sequence[Given]) -> list[Tensor | None]:
    """The tensors of arguments, with those of lists one by one."""
    found: list[Tensor | None] = []
    for argument in arguments:
        found.extend(argument) if isinstance(argument, (list, tuple)) else found.append(argument)
    return found


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
