"""Whether a module still is what it was taken for: what a call that runs no submodules checks before it skips them.

Each function gives the reason why not, in words, and "" where there is none. They look at the module as it is now, cost
tens of nanoseconds a fact, and under torch.compile become guards of the graph.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

__all__ = [
    "Snapshot",
    "attribute",
    "forward_of",
    "full_name",
    "is_sharded",
    "is_transformed",
    "warn_once",
    "why_no_projection",
    "why_not_plain",
    "why_not_plain_parameters",
    "why_not_plain_tensor",
    "why_observed",
    "why_other_geometry",
]

TRACED_TENSORS = (FakeTensor, FunctionalTensor)  # stand in for plain ones while a program is traced


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why running `module` is more than what `kind` does with its parameters.

    Adapters, parametrisations and FSDP change the class of what they wrap; a hook or a replaced `forward` would miss
    the call.
    """
    if type(module) is not kind:
        return f"is a {full_name(type(module))}, not {full_name(kind)} itself"
    return why_observed(module)


def why_observed(module: nn.Module) -> str:
    """Why somebody would miss a call that does not run `module`."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward that was replaced on the module itself"
    if "_compiled_call_impl" in module.__dict__:
        return "is compiled by itself"
    return ""


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is observed by FSDP2 and by nobody else: its hooks gather the parameters for a call, whatever
    the call is given and gives."""
    if module._backward_pre_hooks or module._backward_hooks or vars(module).keys() & {"forward", "_compiled_call_impl"}:
        return False
    hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
    owners = [type(getattr(hook, "__self__", None)).__module__ for hook in hooks]
    return bool(hooks) and all(owner.startswith("torch.distributed.fsdp.") for owner in owners)


def why_not_plain_tensor(tensor: Tensor | None) -> str:
    """Why a parameter is more than its values: quantised and sharded ones have a class of their own."""
    kind = type(tensor)
    if kind is nn.Parameter or kind is Tensor or tensor is None or isinstance(tensor, TRACED_TENSORS):
        return ""
    return f"is a {full_name(kind)}, not a plain tensor"


def why_not_plain_parameters(module: nn.Module) -> str:
    """Why a parameter of a module is more than its values."""
    return next((reason for reason in map(why_not_plain_tensor, module._parameters.values()) if reason), "")


def why_no_projection(module: Any) -> str:
    """Why this is no plain convolution of patches that neither overlap nor lie apart, with plain parameters."""
    reason = why_not_plain(module, nn.Conv2d)
    if reason:
        return reason
    parameters = attribute(module, "weight"), attribute(module, "bias")
    reason = why_not_plain_tensor(parameters[0]) or why_not_plain_tensor(parameters[1])
    return f"has a parameter that {reason}" if reason else why_other_geometry(module)


def why_other_geometry(module: nn.Conv2d) -> str:
    """Why the patches of this convolution overlap, lie apart or are not taken as they are."""
    weight, stride = attribute(module, "weight"), module.stride
    _, _, *kernel = weight.shape  # not module.kernel_size, which the call does not read
    if stride != (*kernel,):
        steps = (stride, stride) if isinstance(stride, int) else stride
        do_overlap = any(one > other for one, other in zip(kernel, steps, strict=True))
        return f"has kernel {(*kernel,)} and stride {stride}: its patches {'overlap' if do_overlap else 'lie apart'}"
    if module.padding not in ((0, 0), "valid", 0) or module.padding_mode != "zeros":
        return f"has padding {module.padding}"
    if module.dilation not in ((1, 1), 1) or module.groups != 1:
        return f"has dilation {module.dilation} and {module.groups} groups"
    return ""


def attribute(module: nn.Module | None, name: str) -> Any:
    """A parameter, submodule or other attribute of a module, None where it has none.

    What `getattr` gives, but for modules with a `__getattr__` of their own, without its detour of a microsecond.
    """
    if module is None:
        return None
    value: Any = module._parameters.get(name)
    if value is None:
        value = module._modules.get(name)
    if value is None:
        value = module.__dict__.get(name)
    if value is None:
        value = module._buffers.get(name)
    if value is None and hasattr(type(module), name):
        return getattr(module, name)
    return value


_HOOKS = operator.itemgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_UNREAD = frozenset(vars(nn.Module())) - {"training"} | {"fastvit_kept"}  # what torch has, and who keeps a snapshot


_FORM = operator.attrgetter("__class__", "dtype", "shape")  # that of another device no op takes


class Snapshot:
    """What the modules of a tree were, down to each attribute, hook and parameter, to see in microseconds whether they
    still are: what was found out about them then holds now.

    An attribute that is changed from within, such as a list, is not seen, nor are the values of parameters and buffers
    but for their class, dtype and shape. What nn.Identity has besides hooks does nothing. The module itself is not
    held, which may hold its snapshot: its memory is free as soon as nobody else has it.
    """

    def __init__(self, module: nn.Module) -> None:
        _, *inner = modules = [*module.modules()]
        self._is_readable = not any(isinstance(part, torch.jit.ScriptModule) for part in modules)
        if not self._is_readable:
            return  # what those are lies in C++
        active = [part for part in inner if type(part) is not nn.Identity]
        self._inner, self._inner_attributes = inner, [*map(vars, inner)]
        self._lengths, self._classes = [*map(len, map(vars, modules))], [*map(type, modules)]
        self._kinds: list[Any] = [*dict.fromkeys(self._classes)]
        self._forwards = [kind.forward for kind in self._kinds]
        self._reader, self._readers = _reader(module), [(_reader(part), vars(part)) for part in active]
        self._holders = [vars(part) for part in active if part._parameters or part._modules]
        self._buffers = [part._buffers for part in (module, *active) if part._buffers]
        self._contents, self._values = self._contents_now(vars(module)), self._values_now(vars(module))
        self._is_comparable = not any(isinstance(value, Tensor) for values in self._values for value in values)
        self._tensors = [value for value in self._contents if isinstance(value, Tensor)]
        self._forms = [*map(_FORM, self._tensors)]

    def holds(self, module: nn.Module) -> bool:
        """Whether nothing has changed."""
        if not self._is_readable:
            return False
        attributes = vars(module)
        every = [attributes, *self._inner_attributes]
        if any(map(any, map(_HOOKS, every))) or [*map(len, every)] != self._lengths:
            return False
        classes = [type(module), *map(type, self._inner)]
        if classes != self._classes or [kind.forward for kind in self._kinds] != self._forwards:
            return False
        contents = self._contents_now(attributes)
        if len(contents) != len(self._contents) or not all(map(operator.is_, contents, self._contents)):
            return False
        try:
            values_are = self._is_comparable and self._values_now(attributes) == self._values
            return bool(values_are) and [*map(_FORM, self._tensors)] == self._forms
        except Exception:  # an attribute is gone, or can't be compared
            return False

    def _values_now(self, attributes: dict[str, Any]) -> list[Any]:
        return [self._reader(attributes), *[reader(others) for reader, others in self._readers]]

    def _contents_now(self, attributes: dict[str, Any]) -> list[Any]:
        found: list[Any] = []
        for others in (attributes, *self._holders):
            found += others["_parameters"].values()
            found += others["_modules"].values()
        for buffers in self._buffers:
            found += buffers.values()
        return found


def _reader(module: nn.Module) -> Callable[[Any], Any]:
    return operator.itemgetter("training", *(name for name in vars(module) if name not in _UNREAD))


def forward_of(kind: type[nn.Module]) -> Any:
    """The `forward` of a class; None where modules alone have it, as those of torch.jit do."""
    try:
        return kind.forward
    except AttributeError:
        return None


def is_transformed() -> bool:
    """Whether a call is watched by what can't see into our ops: forward mode, torch.func, torch.jit.trace."""
    return (
        forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    )


def full_name(cls: type) -> str:
    """The name a class is imported by."""
    return f"{cls.__module__}.{cls.__qualname__}"


_warned: set[tuple[str, str]] = set()


def warn_once(subject: str, reason: str) -> None:
    """Warn that `subject` runs other code than it might, once in a process for every reason; also while a graph is
    traced. Where a module and one inside it have the same reason, the outer one tells."""
    if any(told == (subject, reason) or told[1].endswith(f".{reason}") for told in _warned):
        return
    _warned.add((subject, reason))
    warnings.warn(f"fastvit: {subject}: {reason}", RuntimeWarning, stacklevel=2)


# As torch.compiler.assume_constant_result, which would import the compiler: a warning is no part of a graph.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
