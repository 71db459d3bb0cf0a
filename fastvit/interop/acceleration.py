"""`accelerate`, `restore`, `report`: FastViT's patch embedding in a model that exists already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.backend import check_known
from fastvit.checks import FLOAT_DTYPES, check_scale, normalisation
from fastvit.guards import full_name, why_no_projection
from fastvit.interop.host import Settings, fused, listed
from fastvit.interop.planning import Model, Step, check_module, first_convolution, plan, put_in, restore
from fastvit.interop.reporting import Change, Refusal, Report, Trunk
from fastvit.interop.trunk import TrunkBlock
from fastvit.interop.verification import verify_acceleration

__all__ = ["Unsupported", "accelerate", "report", "restore", "settings_of"]


class Unsupported(ValueError):
    """A model that can't be accelerated; the message says why."""


def accelerate(
    model: Model,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str | None = None,
    copy_images: bool = False,
    trunk: bool = True,
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
        trunk: run the additions and norms of the transformer blocks by :func:`fastvit.functional.add_norm`, where the
            blocks are of a form that is known and the ops are known to pay: on a CPU where the backend "native" is, for
            batches that are not small, or with a backend named here. False: leave the blocks alone.
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
    check_module(model)
    if backend is not None:
        check_known(backend, "backend")
    if residual_dtype is not None and residual_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"residual_dtype: {residual_dtype} is not known; accepted: {', '.join(map(str, FLOAT_DTYPES))}"
        )
    steps, refusals = plan(model)
    if not steps:
        raise Unsupported(_why_none(model, refusals))
    settings = Settings(*_normalisation(steps, mean, std), residual_dtype, backend, bool(copy_images), bool(trunk))
    if verify is not False:
        verify_acceleration(model, settings, None if verify is True else verify)
    put_in(model, steps, settings)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` changed in this model, and what it could not; print it, or take its data.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model)
    changes = []
    companions: set[int] = set()  # change for the sake of one that is named
    for path, module in model.named_modules():
        mixin = fused(module)
        if mixin is not None and mixin.parts(module) and id(module) not in companions:
            changes.append(Change.of(path, module, mixin))
            companions.update(id(part.module) for part in mixin.inside(module) if fused(part.module))
    return Report(type(model).__name__, tuple(changes), tuple(plan(model)[1]), tuple(_trunk_of(model)))


def _trunk_of(model: nn.Module) -> list[Trunk]:
    blocks: dict[type, list[tuple[str, Any]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, TrunkBlock):
            blocks.setdefault(module._own_class, []).append((path, module))
    found = []
    for own, members in blocks.items():
        whole = {path: reason for path, block in members if (reason := block.why_not(block))}
        first = next((block for path, block in members if path not in whole), members[0][1])
        found.append(Trunk(full_name(own), listed(first.parts(first)), tuple(path for path, _ in members), whole))
    return found


def settings_of(model: nn.Module) -> Settings:
    """How an accelerated model was accelerated."""
    accelerated: Any = next(module for module in model.modules() if fused(module))
    return accelerated.fastvit_settings


def _normalisation(
    steps: Sequence[Step], mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
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
    check_scale(means, stds)
    return tuple(means), tuple(stds)


def _why_none(model: nn.Module, refusals: Sequence[Refusal]) -> str:
    for module in model.modules():
        if any(full_name(base).startswith("fastvit.model.") for base in type(module).__mro__):
            return f"model: {type(module).__name__} is FastViT's own and fused already"
    if refusals:
        return "model: can't be accelerated, and is unchanged: " + "; ".join(map(str, refusals))
    path, first = first_convolution(model)
    reason = "" if first is None else why_no_projection(first)
    why = f": its first convolution, {path or 'the model'}, {reason}" if reason else ""
    return (
        f"model: no patch embedding that is known was found in this {type(model).__name__}{why}; "
        "accepted: models of timm, torchvision and transformers as listed in docs/interop.md"
    )
