"""Models and files out of any checkpoint of a Vision Transformer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.checkpoints.adapt import adapt, adapt_head
from fastvit.checkpoints.arguments import model_arguments
from fastvit.checkpoints.errors import CheckpointError, listed
from fastvit.checkpoints.files import read_checkpoint
from fastvit.checkpoints.recognition import Recognised, expected_shapes, fitting, recognise
from fastvit.checkpoints.targets import SCHEMAS, remarks, to_schema
from fastvit.checkpoints.writing import TORCH_SUFFIXES, is_folder_name, write_checkpoint
from fastvit.model import VisionTransformer

LISTED = 20  # names in an error, at most

# What a checkpoint may not say, and the caller may know better. The rest is in its tensors' shapes.
_TOLD = ("num_heads", "norm_eps", "norm_layer", "act_layer", "no_embed_class")
_CONVERTED = (
    "img_size", "patch_size", "in_chans", "num_classes", "num_heads", "norm_eps", "act_layer", "no_embed_class",
)  # fmt: skip
_WAY_OUT = "strict=False, on the command line --no-strict, leaves out what does not fit"


def load_pretrained(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    key: str | None = None,
    allow: Sequence[str] = (),
    strict: bool = True,
    new_head: bool = False,
    **overrides: Any,
) -> VisionTransformer:
    """A model with the weights of any library's Vision Transformer.

    Args:
        source: a .safetensors, .pth, .pt or .npz file, a folder with config.json and weights, a state_dict, or the
            name of a model on the Hugging Face hub, "owner/name".
        key: which of several Vision Transformers in a training's checkpoint: the keys, or the beginning of the names,
            that it is under, such as "teacher" or "state_dict.student.backbone".
        allow: full names of classes, such as "package.module.Class", whose objects a torch file may have beside its
            weights. They are left out; no code of theirs is run.
        strict: False: what does not fit is left out, what is missing is fresh, and a warning lists both.
        new_head: a fresh head in place of the checkpoint's, which `num_classes` other than its own needs.
        overrides: arguments of `VisionTransformer`. `img_size`, `patch_size` and `in_chans` adapt the weights;
            `num_classes=0` leaves the head out; `num_heads`, `norm_eps` and `act_layer` say what the checkpoint does
            not; others, such as `dtype`, `drop_path_rate`, `mean` or `residual_dtype`, change the model.

    Returns:
        The model, in training mode as every module that was just made, with parameters in `dtype` (default: torch's).

    Raises:
        CheckpointError: not a checkpoint, another architecture, names that do not fit (all of them are listed), or
            another number of classes without `new_head`.
        ValueError, TypeError: an override that can't be.
        ImportError: a hub name without huggingface_hub.
    """
    recognised = _recognised(source, key, allow, overrides)
    fitted = _fitting(adapt_head(recognised, overrides.get("num_classes"), new_head), strict)
    fitted = adapt(fitted, overrides) if "patch_embed.proj.weight" in fitted.state else fitted
    arguments = {**fitted.arguments, **overrides}
    shapes = expected_shapes(arguments)
    state = fitting(fitted.state, shapes)
    fresh = [name for name in shapes if name not in state]
    if strict:
        _check_overrides(fitted, shapes, [name for name in fresh if not (new_head and name.startswith("head."))])
    lost = [*fitted.problems, *(f"{name}: not in this model" for name in fitted.state if name not in shapes)]
    assumed = [line for line in fitted.assumed if line.startswith("num_classes=") and "num_classes" not in overrides]
    lines = (("assumed", assumed, "; "), ("left out", lost, "; "), ("fresh, not from the checkpoint", fresh, ", "))
    for what, names, by in lines:
        if names:
            warnings.warn(f"{recognised.source}: {what}: {listed(names, LISTED, by)}", UserWarning, stacklevel=2)
    # Initial weights take long to draw and are needed only where something stays fresh.
    model = VisionTransformer(**{"weight_init": "" if fresh else "skip", **model_arguments(arguments)})
    model.load_state_dict(state, strict=not fresh)
    return model


def convert(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    destination: str | os.PathLike[str],
    to: str = "timm",
    *,
    key: str | None = None,
    allow: Sequence[str] = (),
    strict: bool = True,
    overwrite: bool = False,
    **overrides: Any,
) -> list[str]:
    """Write a checkpoint in another library's names; dtypes stay, and a round trip gives the same bits.

    Args:
        source: as in `load_pretrained`.
        destination: a .safetensors, .pth or .pt file, or a folder, which gets config.json and model.safetensors.
            Hugging Face's format is always a folder, torchvision's always a file.
        to: "timm", "torchvision", "huggingface" (the names that the hub has, and that transformers 4 and 5 load),
            "huggingface-v5" (those of transformers 5 in memory) or "fastvit".
        key, allow: as in `load_pretrained`.
        strict: False: leave out what has no place, and say so.
        overwrite: replace what is at `destination`.
        overrides: `img_size`, `patch_size`, `in_chans`, `num_classes=0`, `num_heads`, `norm_eps`, `act_layer`,
            `no_embed_class`.

    Returns:
        Lines that say what was read, assumed and left out.

    Raises:
        CheckpointError: as `load_pretrained`; or `to` can't express the model; or `destination` exists, or can't
            hold this format. Nothing was written.
        ValueError, TypeError: an override that can't be, or an unknown `to`.
    """
    if to not in SCHEMAS:
        raise ValueError(f"to: {to!r} is not known; accepted: {', '.join(SCHEMAS)}")
    strange = sorted(overrides.keys() - set(_CONVERTED))
    if strange:
        raise TypeError(f"{strange[0]}: is no property of a checkpoint; accepted: {', '.join(_CONVERTED)}")
    is_folder = is_folder_name(Path(destination))
    if to.startswith("huggingface") and not is_folder:
        raise CheckpointError(f"{destination}: names a file; Hugging Face's format is a folder, with config.json in it")
    if to == "torchvision" and is_folder:
        raise CheckpointError(f"{destination}: names a folder; torchvision has files alone: .pth, .pt or .safetensors")
    recognised = _recognised(source, key, allow, overrides)
    whole = adapt_head(recognised, overrides.get("num_classes"))
    if whole.missing or whole.misshapen:
        raise _misfit(whole, whole.problems, "a part of a checkpoint can't be converted")
    fitted = adapt(_fitting(whole, strict), overrides)
    arguments = {**fitted.arguments, **{name: overrides[name] for name in _TOLD if name in overrides}}
    fitted = replace(fitted, arguments=arguments)
    expected_shapes(arguments)
    state, config = to_schema(fitted, to)
    if Path(destination).suffix.lower() in TORCH_SUFFIXES:
        config = None
    write_checkpoint(destination, state, config, overwrite=overwrite)
    return [
        f"{recognised.source}: {recognised.family} in {recognised.schema}'s names",
        *recognised.notes,
        *(f"assumed: {line}" for line in fitted.assumed),
        *(f"left out: {line}" for line in whole.problems),
        *remarks(fitted, to, state, config is not None),
    ]


def _recognised(source: Any, key: str | None, allow: Sequence[str], overrides: Mapping[str, Any]) -> Recognised:
    """What is at `source`; an error says whose it is."""
    checkpoint = read_checkpoint(source, allow=allow)
    known = {name: overrides[name] for name in _TOLD if isinstance(overrides.get(name), (str, int, float))}
    try:
        return recognise(checkpoint, key=key, size_hint=overrides.get("img_size"), **known)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error


def _fitting(recognised: Recognised, strict: bool) -> Recognised:
    """Without what does not fit its own model.

    Raises:
        CheckpointError: something does not, and `strict`.
    """
    if not recognised.problems:
        return recognised
    if strict:
        raise _misfit(recognised, recognised.problems, _WAY_OUT)
    return replace(recognised, state=fitting(recognised.state, expected_shapes(recognised.arguments)))


def _check_overrides(fitted: Recognised, shapes: Mapping[str, torch.Size], fresh: list[str]) -> None:
    """Raise where overrides make another model than the checkpoint's."""
    wrong = [f"{name}: the checkpoint has none" for name in fresh if name not in fitted.state]
    for name, tensor in fitted.state.items():
        if name not in shapes:
            wrong.append(f"{name}: not in this model")
        elif shapes[name] != tensor.shape:
            wrong.append(f"{name}: shape {list(tensor.shape)} in the checkpoint, {list(shapes[name])} in this model")
    if wrong:
        raise _misfit(fitted, wrong, "the overrides make another model", "the model asked for")


def _misfit(recognised: Recognised, lines: list[str], hint: str, whose: str = "") -> CheckpointError:
    whose = whose or f"a {recognised.family} model of FastViT's"
    first = f"{recognised.source}: does not fit {whose} ({len(lines)} names); {hint}."
    return CheckpointError(f"{first}\n  {listed(lines, LISTED, chr(10) + '  ')}")
