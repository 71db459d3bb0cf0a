"""What a checkpoint is: whose names it has, which model it fits, and what of it does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvit.checkpoints.arguments import arguments_of, fold_class_position, model_arguments
from fastvit.checkpoints.configs import family_of, known_from, sizes_from
from fastvit.checkpoints.errors import CheckpointError, listed
from fastvit.checkpoints.files import Checkpoint
from fastvit.checkpoints.finding import Model, choose, find_models, normalised
from fastvit.checkpoints.foreign import DEQUANTISE, FEATURES, MODELS, QUANTISED, found_in
from fastvit.checkpoints.layouts import FLAX, LAYOUTS, MANY_LAYERS, TAKE_HEAD
from fastvit.checkpoints.naming import Layout, Names, State, read_names
from fastvit.model import VisionTransformer

KEPT = "unused."  # FastViT's own folders keep what the model does not use under this

# What a training keeps in a model and an encoder is taken without.
_BESIDE = re.compile(
    r"((\w+_)?(criterion|loss|metrics?|acc|accuracy|predictor|projector|decoder)(_\w+)?|projection_head|n_averaged"
    r"|queue(_ptr)?|center|logit_scale)(\.|$)"
)
# What a module calls the classifier that it puts behind an encoder.
_HEAD = re.compile(r"(\w+_)?(head|heads|classifier|fc|linear|probe)(\.\d+)?\.weight")


@dataclass(frozen=True)
class Recognised(Names):
    """A checkpoint, understood.

    Attributes:
        schema: whose names it has: "fastvit", "timm", "torchvision", "huggingface", "huggingface-v5", "jax" or
            "big_vision".
        family: "vit", "deit", "deit-distilled", "deit3", "mae", "dinov2" or "clip".
        arguments: of `fastvit.VisionTransformer`, as JSON can hold them; `model_arguments` makes them the model's.
        assumed: what the checkpoint does not say, and what was taken.
        config: the checkpoint's config.json.
        source: what to call it in a message.
        notes: where in the checkpoint it was, and what is beside it.
    """

    schema: str = ""
    family: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    config: dict[str, Any] | None = None
    source: str = "state_dict"
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Everything that keeps the checkpoint from being this model, a line each."""
        return [
            *(f"{name}: {reason}" for name, reason in self.refused.items()),
            *(f"{name}: unknown" for name in self.unknown),
            *(f"{name}: missing" for name in self.missing),
            *self.misshapen,
        ]


def recognise(checkpoint: Checkpoint, *, key: str | None = None, size_hint: Any = None, **known: Any) -> Recognised:
    """Say what a checkpoint is, and bring it into our names.

    Args:
        checkpoint: from `read_checkpoint`.
        key: which Vision Transformer of it is meant, where it has several.
        size_hint: an image size to try where the checkpoint's positions fill no square and nothing else says it.
        known: arguments of the checkpoint's model that it does not say, such as `num_heads` or `img_size`; they win
            over what it does say.

    Raises:
        CheckpointError: another architecture; the message says what it seems to be, and why it is not read, but not
            what the checkpoint is called.
    """
    config = checkpoint.config or {}
    family = family_of(config)
    everything = normalised(_unscanned(checkpoint.state))
    model, notes = _model_of(everything, checkpoint.others, key)
    layout = model.layout
    kept = {name.removeprefix(KEPT): tensor for name, tensor in model.state.items() if name.startswith(KEPT)}
    state = {name: tensor for name, tensor in model.state.items() if not name.startswith(KEPT)}
    found = read_names(layout, state)
    _set_aside(model, found)
    _refuse_integers(found.state)
    if "patch_embed.proj.weight" not in found.state:  # its name is there, so that only its shape can be wrong
        raise CheckpointError("; ".join(found.misshapen))
    if "head.weight" in found.state and layout.stored("head.bias") is None:
        weight = found.state["head.weight"]
        found.state["head.bias"] = torch.zeros(weight.shape[:1], dtype=weight.dtype)
    family = family or _family(model, state, found)
    given = {**layout.fixed, **_heads_of_flax(layout, state), **known_from(config), **known}
    conventions = {**layout.assumed, **({"norm_eps": 1e-5} if family == "clip" else {})}
    sizes = sizes_from(config) + ([] if size_hint is None else [size_hint])
    arguments, assumed = arguments_of(found.state, given, conventions, sizes)
    if not arguments["num_classes"] and (heads := _heads_outside(model, everything)):
        assumed.append(f"num_classes=0 ({listed(heads)} left out, outside of the model)")
    tensors, parts = fold_class_position(found.state, arguments)
    if tensors is not found.state:
        arguments["no_embed_class"] = True
    recognised = Recognised(
        **{**vars(found), "state": tensors, "unused": {**found.unused, **parts, **kept}},
        schema="fastvit" if "fastvit" in config else layout.schema,
        family=family,
        arguments=arguments,
        assumed=assumed,
        config=checkpoint.config,
        source=checkpoint.source,
        notes=notes,
    )
    _compare(recognised, layout, state)
    return recognised


def _model_of(state: State, others: Sequence[str], key: str | None) -> tuple[Model, tuple[str, ...]]:
    """The Vision Transformer in a checkpoint, and what is to be said of where it was.

    Args:
        others: names of what else is in the checkpoint.

    Raises:
        CheckpointError: there is none, or the model has more than names can say.
    """
    names = [*state, *others]
    models = find_models(state)
    if not models:
        raise CheckpointError(_nothing_found(names))
    model = choose(models, key)
    inside = [name.removeprefix(model.root) for name in names if name.startswith(model.start)]
    if strange := found_in(FEATURES, inside):
        raise CheckpointError(strange)
    beside = list(dict.fromkeys(_apart(name, model.root) for name in names if not name.startswith(model.root)))
    at = [f"weights under {model.root[:-1]!r}", *([f"beside {listed(beside)}"] if beside else [])]
    return model, (", ".join(at),) if model.root else ()


def _heads_outside(model: Model, state: State) -> list[str]:
    """Classifiers that stand beside a model, in a module that has both."""
    parent, dot, _ = model.root.removesuffix(".").rpartition(".")
    return [
        name
        for name in state
        if name.startswith(parent + dot) and _HEAD.fullmatch(name.removeprefix(parent + dot))
        and model.root and not model.is_self_supervised
    ]  # fmt: skip


def _apart(name: str, root: str) -> str:
    """The shortest beginning of a path that `root` does not have."""
    parts, of_root = name.split("."), root.split(".")
    same = next((i for i, (part, its) in enumerate(zip(parts, of_root, strict=False)) if part != its), 0)
    return ".".join(parts[: same + 1])


def _nothing_found(names: Sequence[str]) -> str:
    """What a checkpoint without a Vision Transformer seems to be."""
    if strange := found_in(MODELS, names):
        return strange
    places = {layout: [place for name in names if (place := layout.find(name))] for layout in LAYOUTS}
    layout = max(places, key=lambda layout: len(places[layout]))
    if any(ours.startswith("blocks.") for ours, _ in places[layout]):  # which a text model may name as a ViT does
        return f"has {layout.schema}'s names of a ViT, but no {layout.names_of('patch_embed.proj.weight')[0]}"
    return f"no names of a Vision Transformer's patches and blocks; it has {', '.join(names[:3])}"


def _refuse_integers(state: State) -> None:
    """Quantised weights would fit in part: biases and norms are never quantised."""
    matrices = {name: tensor.dtype for name, tensor in state.items() if tensor.dim() > 1}
    whole = [name for name, dtype in matrices.items() if not dtype.is_floating_point]
    if 2 * len(whole) > len(matrices):
        raise CheckpointError(f"seems to be {QUANTISED} ({whole[0]} is {matrices[whole[0]]}): {DEQUANTISE}")


def _family(model: Model, state: State, found: Names) -> str:
    """What the model is, told by its tensors."""
    layout, ours = model.layout, found.state
    if "norm_pre.weight" in ours:
        return "clip"
    if layout.family != "vit":
        return layout.family
    if "dist_token" in state or layout.schema.startswith("huggingface") and "reg_token" in ours:
        return "deit-distilled"
    if any(name.endswith("ls1.gamma") for name in ours):
        table = ours.get("pos_embed")
        is_dino = "mask_token" in found.unused or "reg_token" in ours or table is None or _is_odd_square(table)
        return "dinov2" if is_dino else "deit3"
    return "deit" if layout.prefix == "deit." else "vit"


def _is_odd_square(table: Tensor) -> bool:
    """Whether a table has a row for the class token beside a square of patches."""
    patches = table.shape[1] - 1 if table.dim() == 3 else 0
    return patches > 0 and int(patches**0.5) ** 2 == patches


def _heads_of_flax(layout: Layout, state: State) -> dict[str, Any]:
    """Flax stores the heads apart, so that a file says how many there are."""
    kernel = state.get(layout.names_of("blocks.0.attn.qkv.weight")[0]) if layout.schema in FLAX else None
    return {} if kernel is None or kernel.dim() != 3 else {"num_heads": kernel.shape[1]}


def _set_aside(model: Model, found: Names) -> None:
    """Take out what goes with a part that FastViT lacks, and what only stands beside the model."""
    reason = next((reason for reason in found.refused.values() if reason in TAKE_HEAD), "")
    for ours in [name for name in found.state if reason and name.startswith("head.")]:
        del found.state[ours]
        found.refused.update(dict.fromkeys(model.layout.names_of(ours), f"reads what was refused; {reason}"))
    projection = [name for name, why in found.refused.items() if why == MANY_LAYERS and model.is_self_supervised]
    outside = [
        name
        for name in found.unknown  # where a number of no dimension counts something
        if _BESIDE.match(name) or not name.startswith(model.layout.prefix) or model.state[name].dim() == 0
    ]
    for name in projection:
        del found.refused[name]
    for name in outside:
        found.unknown.remove(name)
    found.beside.extend(projection + outside)


def _unscanned(state: Mapping[str, Tensor]) -> State:
    """Blocks that Flax has stacked into one, in a first dimension, taken apart."""
    apart: State = {}
    for name, tensor in state.items():
        before, stacked, after = f"/{name}".partition("/encoderblock/")
        if stacked and tensor.dim():
            apart |= {f"{before}/encoderblock_{index}/{after}"[1:]: part for index, part in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


def expected_shapes(arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of the model with these arguments; nothing is allocated."""
    made = {**model_arguments(arguments), "device": "meta", "weight_init": "skip"}
    return {name: tensor.shape for name, tensor in VisionTransformer(**made).state_dict().items()}


def fitting(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> State:
    """The tensors that are floating point numbers of the right shape."""
    return {name: t for name, t in state.items() if shapes.get(name) == t.shape and t.is_floating_point()}


def _compare(recognised: Recognised, layout: Layout, state: Mapping[str, Tensor]) -> None:
    """Fill in what is unknown, missing or misshapen, under the checkpoint's own names."""
    shapes = expected_shapes(recognised.arguments)
    for ours, shape in shapes.items():
        names = layout.names_of(ours)
        tensor, called = recognised.state.get(ours), " + ".join(names)
        if tensor is None:
            # what is there was refused, misshapen, or a part of what was never put together
            recognised.missing.extend(name for name in names if name not in state and name not in recognised.missing)
        elif not tensor.is_floating_point():
            recognised.misshapen.append(f"{called}: {tensor.dtype}, expected floating point numbers")
        elif tensor.shape != shape:
            recognised.misshapen.append(f"{called}: shape {list(tensor.shape)}, expected {list(shape)} as {ours}")
    for ours in recognised.state.keys() - shapes.keys():
        recognised.unknown.extend(layout.names_of(ours))
    recognised.unknown.sort()
