"""Giving a module another class while it keeps everything else: parameters, buffers, hooks, name, identity.

The new class is made of a mixin and the module's own class, whatever that is (a subclass of the user's, what FSDP
made of it). Only methods change, so that state_dict, optimizers and isinstance see the same module, and taking the
mixin out again restores it exactly. Copies and pickles go by the parts, since a class made here has no address.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

__all__ = ["Mixin", "mix_in", "mixin_of", "own_class", "take_out"]

# What stands behind a mixin is known at run time only; so a type checker asks nothing of `self` and `super()`.
_AnyModule: Any = object

# A class is made once: modules of one class stay of one class.
_made: dict[tuple[type[Mixin], type[nn.Module]], Any] = {}


class Mixin(_AnyModule):
    """What a mixin is: methods in front of those of the module's own class."""

    overrides: ClassVar[tuple[str, ...]] = ()  # methods of the host's that a mixin stands in for, or relies on

    _mixin: type[Mixin]
    _own_class: type[nn.Module]
    _argument_names: tuple[str, ...]  # of the own class's forward, behind the first
    _found: dict[str, Any]  # the own class's methods of these names when the mixin was put in

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Called for a new module only, by `type(module)(...)`, and that one was never given a mixin.
        super().__init__(*args, **kwargs)
        take_out(self)

    @classmethod
    def methods(cls, own: Any) -> dict[str, Callable]:
        """What is put in front of the methods of `own`, by name."""
        return {name: getattr(cls, name) for name in cls.overrides if hasattr(cls, name)}

    def __reduce_ex__(self, protocol: Any) -> Any:
        rebuild, arguments, *state = super().__reduce_ex__(protocol)
        if arguments and arguments[0] is type(self) and _is_mixed(type(self)):
            return _rebuild, (rebuild, self._mixin, self._own_class, *arguments[1:]), *state
        return rebuild, arguments, *state


def mix_in(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put the methods of `mixin` in front of those of the module's class."""
    module.__class__ = _mixed(mixin, type(module))


def take_out(module: nn.Module) -> None:
    """Undo :func:`mix_in`, also where the class was derived from since then (as FSDP does)."""
    module.__class__ = _without(type(module))


def mixin_of(module: nn.Module) -> type[Mixin] | None:
    """The mixin in this module's class, None if there is none."""
    return getattr(type(module), "_mixin", None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without a mixin's."""
    return getattr(type(module), "_own_class", type(module))


def _mixed(mixin: type[Mixin], own: type[nn.Module]) -> Any:
    if (mixin, own) not in _made:
        # The name and address of the module's own class: libraries write them into configurations.
        namespace: dict[str, Any] = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "_mixin": mixin,
            "_own_class": own,
            "_argument_names": tuple(inspect.signature(own.forward).parameters)[2:],
            "_found": {name: getattr(own, name) for name in mixin.overrides if hasattr(own, name)},
        }
        for name, method in mixin.methods(own).items():
            namespace[name] = _in_front(method, name, own)
        _made[mixin, own] = type(own.__name__, (mixin, own), namespace)
    return _made[mixin, own]


def _in_front(method: Callable, name: str, own: Any) -> Callable:
    """A method of a mixin with the signature of the host's, by which libraries choose what to call it with.

    Tools that wrap a bound method keep it in the module, where it outlives the mixin: then the host's own is called.
    """

    @functools.wraps(getattr(own, name))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Mixin):
            return getattr(type(self), name)(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    call.is_in_front = True  # type: ignore[attr-defined]
    return call


def _is_mixed(cls: type) -> bool:
    return "_mixin" in vars(cls)


def _without(cls: type) -> type:
    if _is_mixed(cls):
        return vars(cls)["_own_class"]
    bases = tuple(_without(base) if issubclass(base, Mixin) else base for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    # The class under the mixin may have been derived from in the same way before.
    # What wraps a mixin's method, as transformers does in every class derived from its layers, goes with it.
    namespace = {
        name: value
        for name, value in vars(cls).items()
        if name not in ("__dict__", "__weakref__") and not getattr(value, "is_in_front", False)
    }
    return type(cls.__name__, bases, namespace)


def _rebuild(rebuild: Any, mixin: type[Mixin], own: type[nn.Module], *arguments: Any) -> Any:
    return rebuild(_mixed(mixin, own), *arguments)
