"""`accelerate`, `restore`, `report`: FastViT's patch embedding in a model that exists already."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvit.backend import check_known
from fastvit.checks import FLOAT_DTYPES, normalisation
from fastvit.guards import full_name, why_no_projection, why_other_geometry
from fastvit.interop.host import LIBRARIES, Fused, Settings, fused, is_library_s
from fastvit.interop.raw_pixels import HOOK, close_door, open_doors
from fastvit.interop.reporting import Change, Refusal, Report
from fastvit.interop.surgery import mix_in, mixin_of, own_class, take_out

__all__ = ["Unsupported", "accelerate", "report", "restore", "settings_of"]

# What an accelerated module has beside its own attributes.
OURS = ("fastvit_settings", "fastvit_looked", "fastvit_door")

Model = TypeVar("Model", bound=nn.Module)


class Unsupported(ValueError):
    """A model that can't be accelerated; the message says why."""


class _Step(NamedTuple):
    """A module that is to change, and how."""

    path: str
    module: Any
    mixin: type[Fused]


def accelerate(
    model: Model,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str | None = None,
    copy_images: bool = False,
    verify: bool | Tensor | Mapping[str, Any] = False,
) -> Model:
    """Make a model of timm, torchvision or transformers embed its images by :func:`fastvit.functional.patch_embed`.

    The model is changed in place, and nothing but the code that runs changes: its parameters, their names, its
    state_dict, its hooks and its class (for isinstance) stay, so that optimizers, EMA, DDP and FSDP go on. A part runs
    as one call only while it is what it was: where somebody listens to a module inside, or a module, a method, a table
    or the projection's geometry was replaced since, the library's own code runs, with one warning that says why, and
    :func:`report` says so. Accelerating once more with other arguments replaces them.

    Args:
        model: a module with one or more Vision Transformers inside, also wrapped or compiled.
        mean, std: one float a channel, in the 0..1 scale. With them the model takes raw uint8 batches too, [B, C, H, W]
            or [B, H, W, C], and normalises them inside the projection. Batches of floats are taken as before,
            normalised already. Give the outermost module, since what is around the part that normalises may cast.
        residual_dtype: dtype of the tokens under autocast. None: the library's, which is float32, since class token
            and positions are. torch.bfloat16 halves the traffic of the residual stream, and rounds it.
        backend: as in :func:`fastvit.functional.patch_embed`.
        copy_images: keep a copy of uint8 images for the backward pass, for loaders that overwrite a batch before it.
            What torch's own ops overwrite raises an error without it; what numpy or a GPU loader does is not seen.
        verify: run copies of the model, before and after, on the same batch and compare outputs and every gradient
            (:func:`fastvit.interop.verification.verify_acceleration`); takes the memory of three models while it
            lasts. True: on random images. Images, or the model's arguments by name: on these.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.
        Unsupported: (a ValueError) no patch embedding in it can be accelerated; the message says why.
        ValueError: an argument that can't be.
        VerificationError: (a RuntimeError) the results differ beyond the tolerance rule.
        In every case the model is as it was.
    """
    _check_module(model)
    if backend is not None:
        check_known(backend, "backend")
    if residual_dtype is not None and residual_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"residual_dtype: {residual_dtype} is not known; accepted: {', '.join(map(str, FLOAT_DTYPES))}"
        )
    steps, refusals = _plan(model)
    if not steps:
        raise Unsupported(_why_none(model, refusals))
    settings = Settings(*_normalisation(steps, mean, std), residual_dtype, backend, bool(copy_images))
    if settings.mean is not None:
        steps += _steps_for_raw_pixels(model)
    if verify is not False:
        from fastvit.interop.verification import verify_acceleration

        verify_acceleration(model, settings, None if verify is True else verify)
    _apply(model, steps, settings)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, exactly; a model that is not accelerated stays as it is.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module(model)
    for module in model.modules():
        close_door(module)
        if mixin_of(module) is not None:
            take_out(module)
            for name in OURS:
                module.__dict__.pop(name, None)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` changed in this model, and what it could not; print it, or take its data.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module(model)
    changes = []
    companions: set[int] = set()  # change for the sake of one that is named
    for path, module in model.named_modules():
        mixin = fused(module)
        if mixin is not None and mixin.parts(module) and id(module) not in companions:
            changes.append(Change.of(path, module, mixin))
            companions.update(id(part.module) for part in mixin.inside(module) if fused(part.module))
    return Report(type(model).__name__, tuple(changes), tuple(_plan(model)[1]))


def settings_of(model: nn.Module) -> Settings:
    """How an accelerated model was accelerated."""
    accelerated: Any = next(module for module in model.modules() if fused(module))
    return accelerated.fastvit_settings


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _plan(model: nn.Module) -> tuple[list[_Step], list[Refusal]]:
    """What can be changed in a model, outermost modules first, and what can't."""
    steps: list[_Step] = []
    refusals: list[Refusal] = []
    planned: set[int] = set()
    _, first = _first_convolution(model)
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
        new = [_Step(path, module, mixin)]
        for name, companion in mixin.companions(module).items():
            # Two models may share one.
            if id(module.get_submodule(name)) not in planned:
                new.append(_Step(f"{path}.{name}" if path else name, module.get_submodule(name), companion))
        steps += new
        planned.update(id(step.module) for step in new)
    return steps, refusals


def _apply(model: nn.Module, steps: Sequence[_Step], settings: Settings) -> None:
    """All of it or nothing."""
    before = [_State.of(module) for module in model.modules()]
    try:
        restore(model)
        for step in steps:
            mix_in(step.module, step.mixin)
            step.module.fastvit_settings = settings
        if settings.mean is not None:
            open_doors(model, [step.module for step in steps], len(settings.mean))
    except BaseException:
        for state in before:
            state.put_back()
        raise


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


def _normalisation(
    steps: Sequence[_Step], mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The same for all that takes images."""
    if mean is None and std is None:
        return None, None
    means: Sequence[float] | None = None
    stds: Sequence[float] | None = None
    for step in steps:
        reason = step.mixin.refuses_uint8(step.module)
        if reason:
            raise Unsupported(f"mean, std: {step.path or 'the model'} takes no raw uint8 images: {reason}")
        channels = step.mixin.channels(step.module)
        if channels is not None:
            means, stds = normalisation(mean, std, channels)
    assert means is not None and stds is not None
    return tuple(means), tuple(stds)


def _steps_for_raw_pixels(model: nn.Module) -> list[_Step]:
    """Models of transformers that use their images in a loss."""
    more: list[_Step] = []
    for path, module in model.named_modules():
        names = {full_name(base) for base in type(module).__mro__}
        if any(name.startswith("transformers.") for name in names):
            huggingface: Any = importlib.import_module(LIBRARIES["transformers"])
            if names.intersection(huggingface.RawPixelsInLoss.hosts):
                more.append(_Step(path, module, huggingface.RawPixelsInLoss))
    return more


def _host_of(module: nn.Module) -> tuple[Any, type[Fused]] | None:
    """The class of a library that this module is an instance of, and the mixin for it."""
    for base in type(module).__mro__:
        library = base.__module__.partition(".")[0]
        if library in LIBRARIES and not issubclass(base, Fused):
            mixin = _mixins(library).get(full_name(base))
            if mixin is not None:
                return base, mixin
    return None


@lru_cache
def _mixins(library: str) -> Mapping[str, type[Fused]]:
    # Where there is an instance, its library has been imported, so that this imports none.
    module: Any = importlib.import_module(LIBRARIES[library])
    return {name: mixin for mixin in module.MIXINS for name in mixin.hosts}


def _misfit(module: nn.Module, host: type, mixin: type[Fused]) -> str:
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


def _why_none(model: nn.Module, refusals: Sequence[Refusal]) -> str:
    for module in model.modules():
        if any(full_name(base).startswith("fastvit.model.") for base in type(module).__mro__):
            return f"model: {type(module).__name__} is FastViT's own and fused already"
    if refusals:
        return "model: can't be accelerated, and is unchanged: " + "; ".join(map(str, refusals))
    path, first = _first_convolution(model)
    reason = "" if first is None else why_no_projection(first)
    why = f": its first convolution, {path or 'the model'}, {reason}" if reason else ""
    return (
        f"model: no patch embedding that is known was found in this {type(model).__name__}{why}; "
        "accepted: models of timm, torchvision and transformers as listed in docs/interop.md"
    )


def _first_convolution(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The convolution that most likely sees the images, and where it is; None where there is none."""
    return next(((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)), ("", None))
