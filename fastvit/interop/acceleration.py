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
from fastvit.interop.host import Fused, Settings, full_name, projection_refusal
from fastvit.interop.reporting import Change, Refusal, Report
from fastvit.interop.surgery import mix_in, mixin_of, take_out

__all__ = ["Unsupported", "accelerate", "report", "restore", "settings_of"]

# Library of a class → where its mixins are.
LIBRARIES = {
    "timm": "fastvit.interop.timm",
    "torchvision": "fastvit.interop.torchvision",
    "transformers": "fastvit.interop.huggingface",
}

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
    verify: bool | Tensor | Mapping[str, Any] = False,
) -> Model:
    """Make a model of timm, torchvision or transformers embed its images by :func:`fastvit.functional.patch_embed`.

    The model is changed in place, and nothing but the code that runs changes: its parameters, their names, its
    state_dict, its hooks and its class (for isinstance) stay, so that optimizers, EMA, DDP and FSDP go on. A call that
    can't be one call of ours (somebody listens to a module inside, an adapter is wrapped around the projection, a mask
    of patches is given) runs the library's own code. Accelerating once more with other arguments replaces them.

    Args:
        model: a module with one or more Vision Transformers inside, also wrapped or compiled.
        mean, std: one float a channel, in the 0..1 scale. With them the model takes raw uint8 batches too, [B, C, H, W]
            or [B, H, W, C], and normalises them inside the projection. Batches of floats are taken as before,
            normalised already.
        residual_dtype: dtype of the tokens under autocast. None: the library's, which is float32, since class token
            and positions are. torch.bfloat16 halves the traffic of the residual stream, and rounds it.
        backend: as in :func:`fastvit.functional.patch_embed`.
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
    settings = _settings(steps, mean, std, residual_dtype, backend)
    if settings.mean is not None:
        steps += _steps_for_raw_pixels(model, steps)
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
        if mixin_of(module) is not None:
            take_out(module)
            del module.fastvit_settings
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
        mixin: Any = mixin_of(module)
        if mixin is not None and mixin.parts(module) and id(module) not in companions:
            changes.append(Change.of(path, module, mixin))
            companions.update(id(module.get_submodule(name)) for name in mixin.companions(module))
    return Report(type(model).__name__, tuple(changes), tuple(_plan(model)[1]))


def settings_of(model: nn.Module) -> Settings:
    """How an accelerated model was accelerated."""
    accelerated: Any = next(module for module in model.modules() if mixin_of(module) is not None)
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
        reason = _misfit(module, host, mixin) or mixin.refusal(module) or _inner_misfit(module, mixin)
        if not reason and first not in mixin.leaves(module):
            reason = mixin.refusal_behind(module)
        if reason:
            refusals.append(Refusal(path, full_name(_own_class(module)), reason))
            continue
        new = [_Step(path, module, mixin)]
        for name, companion in mixin.companions(module).items():
            new.append(_Step(f"{path}.{name}" if path else name, module.get_submodule(name), companion))
        steps += new
        planned.update(id(step.module) for step in new)
    return steps, refusals


def _apply(model: nn.Module, steps: Sequence[_Step], settings: Settings) -> None:
    restore(model)
    for step in steps:
        mix_in(step.module, step.mixin)
        step.module.fastvit_settings = settings


def _settings(
    steps: Sequence[_Step],
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    residual_dtype: torch.dtype | None,
    backend: str | None,
) -> Settings:
    if mean is None and std is None:
        return Settings(None, None, residual_dtype, backend)
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
    return Settings(tuple(means), tuple(stds), residual_dtype, backend)


def _steps_for_raw_pixels(model: nn.Module, steps: Sequence[_Step]) -> list[_Step]:
    """The modules of transformers that see images before the embeddings do."""
    embeddings = {id(step.module) for step in steps if step.mixin.__module__ == LIBRARIES["transformers"]}
    if not embeddings:
        return []
    huggingface: Any = importlib.import_module(LIBRARIES["transformers"])
    more: list[_Step] = []
    for path, module in model.named_modules():
        names = {full_name(base) for base in type(module).__mro__}
        if names.intersection(huggingface.NEED_NORMALISED):
            raise Unsupported(
                f"mean, std: {path or 'the model'} takes no raw uint8 images: its loss compares them with its output"
            )
        if names.intersection(huggingface.RawPixelsInLoss.hosts):
            more.append(_Step(path, module, huggingface.RawPixelsInLoss))
        if id(getattr(module, "embeddings", None)) in embeddings:
            if "forward" in module.__dict__:
                raise Unsupported(
                    f"mean, std: {path or 'the model'} takes no raw uint8 images: its forward was replaced on the "
                    "module itself, and may cast them"
                )
            more.append(_Step(path, module, huggingface.RawPixels))
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


def _own_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_own_class", type(module))


def _misfit(module: nn.Module, host: type, mixin: type[Fused]) -> str:
    """Why a module of the host's class, or of one derived from it, is not one we know, "" if it is."""
    own = _own_class(module)
    for name in mixin.overrides:
        if name in module.__dict__ and hasattr(mixin, name):  # which would never be called
            return f"its {name} was replaced on the module itself"
    changed = [name for name in mixin.overrides if getattr(own, name, None) is not getattr(host, name, None)]
    return f"{own.__name__} has a {changed[0]} of its own" if changed else ""


def _inner_misfit(module: nn.Module, mixin: type[Fused]) -> str:
    """Why what a fused call does in place of submodules is not what they do, "" if it is."""
    for inner in mixin.passed_over(module):
        own = _own_class(inner)
        if own.forward.__module__.partition(".")[0] not in LIBRARIES:
            return f"the {own.__name__} in it has a forward of its own"
    return ""


def _why_none(model: nn.Module, refusals: Sequence[Refusal]) -> str:
    for module in model.modules():
        if any(full_name(base).startswith("fastvit.model.") for base in type(module).__mro__):
            return f"model: {type(module).__name__} is FastViT's own and fused already"
    if refusals:
        return "model: can't be accelerated, and is unchanged: " + "; ".join(map(str, refusals))
    path, first = _first_convolution(model)
    reason = "" if first is None else projection_refusal(f"its first convolution, {path or 'the model'},", first)
    why = f": {reason}" if reason else ""
    return (
        f"model: no patch embedding that is known was found in this {type(model).__name__}{why}; "
        "accepted: models of timm, torchvision and transformers as listed in docs/interop.md"
    )


def _first_convolution(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The convolution that most likely sees the images, and where it is; None where there is none."""
    return next(((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)), ("", None))
