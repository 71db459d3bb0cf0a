"""What of a model can be accelerated, and how that is put in and taken out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fastvit.guards import full_name, why_other_geometry
from fastvit.interop.host import LIBRARIES, Fused, Settings, is_library_s
from fastvit.interop.raw_pixels import HOOK, close_door, open_doors
from fastvit.interop.reporting import Refusal
from fastvit.interop.surgery import Mixin, mix_in, mixin_of, own_class, take_out
from fastvit.interop.trunk import Blocks

__all__ = ["Step", "check_module", "first_convolution", "plan", "put_in", "restore"]

# What an accelerated module has beside its own attributes.
OURS = ("fastvit_settings", "fastvit_looked", "fastvit_door", "fastvit_kept")

Model = TypeVar("Model", bound=nn.Module)


class Step(NamedTuple):
    """A module that is to change, and how."""

    path: str
    module: Any
    mixin: Any  # a Fused, for what embeds images, or a Mixin of the trunk


def plan(model: nn.Module) -> tuple[list[Step], list[Refusal]]:
    """What can be changed in a model, outermost modules first, and what can't."""
    steps: list[Step] = []
    refusals: list[Refusal] = []
    planned: set[int] = set()
    _, first = first_convolution(model)
    for path, module in model.named_modules():
        if id(module) in planned:
            continue
        found = _host_of(module)
        if found is None:
            continue
        host, mixin = found
        reason = _misfit(module, host, mixin) or mixin.refusal(module) or _misfit_inside(module, mixin)
        if not reason and first not in [part.module for part in mixin.inside(module)]:
            reason = mixin.refusal_behind(module)
        if reason:
            refusals.append(Refusal(path, full_name(own_class(module)), reason))
            continue
        new = [Step(path, module, mixin)]
        for name, companion in mixin.companions(module).items():
            # Two models may share one.
            if id(module.get_submodule(name)) not in planned:
                new.append(Step(f"{path}.{name}" if path else name, module.get_submodule(name), companion))
        steps += new
        planned.update(id(step.module) for step in new)
    return steps, refusals


def plan_trunk(model: nn.Module) -> list[Step]:
    """The blocks that can be changed in a model, and the sequences of nothing but such blocks."""
    blocks = []
    for path, module in model.named_modules():
        found = _host_of(module, "TRUNK")
        if found is not None and not _misfit(module, *found) and not found[1].refusal(module):
            found[1].learn(module)
            blocks.append(Step(path, module, found[1]))
    planned = {id(step.module) for step in blocks}
    sequences = [
        Step(path, module, Blocks)
        for path, module in model.named_modules()
        if type(module) is nn.Sequential and len(module) and all(id(block) in planned for block in module)
    ]
    return [*blocks, *sequences]


def put_in(model: nn.Module, steps: Sequence[Step], settings: Settings) -> None:
    """All of it or nothing: what `plan` found, and the blocks that can be changed."""
    before = [_State.of(module) for module in model.modules()]
    try:
        restore(model)
        for step in (*steps, *(plan_trunk(model) if settings.trunk else ())):
            mix_in(step.module, step.mixin)
            step.module.fastvit_settings = settings
        if settings.mean is not None and settings.std is not None:
            open_doors(model, [step.module for step in steps], settings.mean, settings.std)
    except BaseException:
        for state in before:
            state.put_back()
        raise


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, exactly; a model that is not accelerated stays as it is.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model)
    for module in model.modules():
        close_door(module)
        if mixin_of(module) is not None:
            take_out(module)
            for name in OURS:
                module.__dict__.pop(name, None)
    return model


def check_module(model: object) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


class _State(NamedTuple):
    """What accelerating changes of a module."""

    module: nn.Module
    kind: type
    door: Any
    ours: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        ours = {name: module.__dict__[name] for name in OURS if name in module.__dict__}
        return cls(module, type(module), module._forward_pre_hooks.get(HOOK), ours)  # type: ignore[call-overload]

    def put_back(self) -> None:
        close_door(self.module)
        self.module.__class__ = self.kind
        for name in OURS:
            self.module.__dict__.pop(name, None)
        self.module.__dict__.update(self.ours)
        if self.door is not None:
            self.door.put_in(self.module)


def _host_of(module: nn.Module, kind: str = "MIXINS") -> tuple[Any, Any] | None:
    """The class of a library that this module is an instance of, and the mixin for it."""
    for base in type(module).__mro__:
        library = base.__module__.partition(".")[0]
        if library in LIBRARIES and not issubclass(base, Mixin):
            mixin = _mixins(library, kind).get(full_name(base))
            if mixin is not None:
                return base, mixin
    return None


@lru_cache
def _mixins(library: str, kind: str) -> Mapping[str, Any]:
    # Where there is an instance, its library has been imported, so that this imports none.
    module: Any = importlib.import_module(LIBRARIES[library])
    return {name: mixin for mixin in getattr(module, kind, ()) for name in mixin.hosts}


def _misfit(module: nn.Module, host: type, mixin: type[Mixin]) -> str:
    """Why a module of the host's class, or of one derived from it, is not one we know, "" if it is."""
    own = own_class(module)
    for name in mixin.overrides:
        if name in module.__dict__ and name in mixin.methods(own):  # which would never be called
            return f"its {name} was replaced on the module itself"
    for name in mixin.overrides:
        method = getattr(own, name, None)
        if method is not getattr(host, name, None):
            return f"{own.__name__} has a {name} of its own"
        if method is not None and not is_library_s(method):
            return f"the {name} of {host.__name__} was replaced"
    return ""


def _misfit_inside(module: nn.Module, mixin: type[Fused]) -> str:
    """Why what a fused call does in place of submodules is not what they do, "" if it is. Hooks are no reason: while
    they are there, calls are the library's."""
    part: Any
    for name, part, kind in mixin.inside(module):
        if kind is None or issubclass(kind, Fused):
            own = own_class(part)
            if not is_library_s(own.forward):
                return f"the {own.__name__} in it has a forward of its own"
            continue
        if type(part) is not kind:
            return f"{name} is a {full_name(type(part))}, not {full_name(kind)} itself"
        # Parameters at rest may be sharded; what they are in a call, the call sees.
        reason = why_other_geometry(part) if kind is nn.Conv2d else ""
        if reason:
            return f"{name} {reason}"
    return ""


def first_convolution(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The convolution that most likely sees the images, and where it is; None where there is none."""
    return next(((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)), ("", None))
