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
from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.files import Checkpoint
from fastvit.checkpoints.finding import Model, choose, find_models, normalised
from fastvit.checkpoints.foreign import DEQUANTISE, QUANTISED, foreign_features, foreign_model
from fastvit.checkpoints.layouts import LAYOUTS, MANY_LAYERS, takes_head
from fastvit.checkpoints.naming import Layout, Names, State, names_of, read_names

__all__ = ["Recognised", "expected_shapes", "fitting", "recognise"]

LISTED = 6  # names in a message, at most
UNUSED = "unused."  # FastViT's own folders keep what the model does not use under this

# What a training keeps in a model and an encoder is taken without.
_BESIDE = re.compile(
    r"((\w+_)?(criterion|loss|metrics?|acc|accuracy|predictor|projector|decoder)(_\w+)?|projection_head|n_averaged"
    r"|queue(_ptr)?|center|logit_scale)(\.|$)"
)


@dataclass(frozen=True)
class Recognised:
    """A checkpoint, understood.

    Attributes:
        schema: whose names it has: "fastvit", "timm", "torchvision", "huggingface", "huggingface-v5", "jax" or
            "big_vision".
        family: "vit", "deit", "deit-distilled", "deit3", "mae", "dinov2" or "clip".
        arguments: of `fastvit.VisionTransformer`, as JSON can hold them; `model_arguments` makes them the model's.
        state: the tensors in our names.
        assumed: what the checkpoint does not say, and what was taken.
        unknown: names in the checkpoint that mean nothing to FastViT.
        missing: names that the model needs and the checkpoint lacks.
        misshapen: names whose shape is not the model's, with both shapes.
        refused: names that are understood but have no place in FastViT, and why.
        unused: tensors that do not enter the encoder's output; kept for the way back.
        beside: names of other parts of a larger model, which are left out.
        config: the checkpoint's config.json.
        source: what to call it in a message.
        notes: where in the checkpoint it was, and what is beside it.
    """

    schema: str
    family: str
    arguments: dict[str, Any]
    state: State
    assumed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    unused: State = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
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
        CheckpointError: another architecture; the message says what it seems to be, and why it is not read.
    """
    try:
        return _recognise(checkpoint, key, known, size_hint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error


def _recognise(checkpoint: Checkpoint, key: str | None, known: Mapping[str, Any], size_hint: Any) -> Recognised:
    config = checkpoint.config or {}
    family = family_of(config)
    everything = normalised(_unscanned(checkpoint.state))
    model, notes = _model_of(everything, checkpoint.others, key)
    state, kept = _without_unused(model.state)
    layout, prefix = model.layout, model.prefix
    found = read_names(layout, prefix, state)
    _set_aside(model, found)
    matrices = {name: tensor.dtype for name, tensor in found.state.items() if tensor.dim() > 1}
    whole = [name for name, dtype in matrices.items() if not dtype.is_floating_point]
    if 2 * len(whole) > len(matrices):
        raise CheckpointError(f"seems to be {QUANTISED} ({whole[0]} is {matrices[whole[0]]}): {DEQUANTISE}")
    if "patch_embed.proj.weight" not in found.state:  # its name is there, so that only its shape can be wrong
        raise CheckpointError("; ".join(found.misshapen))
    if layout.projection and "head.weight" in found.state:
        weight = found.state["head.weight"]
        found.state["head.bias"] = torch.zeros(weight.shape[:1], dtype=weight.dtype)
    family = family or str(config.get("family", "")) or _family(layout, prefix, state, found)
    given = {**layout.fixed, **_heads_of_flax(layout, state), **known_from(config), **known}
    assumptions = {**layout.assumed, **({"norm_eps": 1e-5} if family == "clip" else {})}
    sizes = sizes_from(config) + ([] if size_hint is None else [size_hint])
    arguments, assumed = arguments_of(found.state, given, assumptions, sizes)
    tensors, parts = fold_class_position(found.state, arguments)
    if tensors is not found.state:
        arguments["no_embed_class"] = True
    recognised = Recognised(
        schema="fastvit" if "fastvit" in config else layout.schema,
        family=family,
        arguments=arguments,
        state=tensors,
        assumed=assumed,
        unknown=found.unknown,
        missing=found.incomplete,
        misshapen=found.misshapen,
        refused=found.refused,
        unused={**found.unused, **parts, **kept},
        beside=found.beside,
        config=checkpoint.config,
        source=checkpoint.source,
        notes=notes,
    )
    _compare(recognised, layout, prefix)
    return recognised


def _model_of(state: State, others: Sequence[str], key: str | None) -> tuple[Model, tuple[str, ...]]:
    """The Vision Transformer in a checkpoint, and what is to be said of where it was.

    Args:
        others: what else is in the checkpoint.

    Raises:
        CheckpointError: there is none, or the model has more than names can say.
    """
    models = find_models(state)
    if not models:
        raise CheckpointError(_nothing_found([*state, *others]))
    model = choose(models, key)
    root = model.root
    outside = [name for name in (*state, *others) if not name.startswith(root)]
    inside = [name[len(root) :] for name in (*state, *others) if name.startswith(root + model.prefix)]
    strange = foreign_features(inside)
    if strange:
        raise CheckpointError(strange)
    if not root:
        return model, ()
    beside = list(dict.fromkeys(_first_apart(name, root) for name in outside))
    more = f" and {len(beside) - LISTED} more" if len(beside) > LISTED else ""
    return model, (f"weights under {root[:-1]!r}" + (f", beside {', '.join(beside[:LISTED])}{more}" if beside else ""),)


def _first_apart(name: str, root: str) -> str:
    """The shortest beginning of a path that `root` does not have."""
    parts, of_root = name.split("."), root.split(".")
    same = next((i for i, (part, its) in enumerate(zip(parts, of_root, strict=False)) if part != its), 0)
    return ".".join(parts[: same + 1])


def _nothing_found(names: Sequence[str]) -> str:
    """What a checkpoint without a Vision Transformer seems to be."""
    strange = foreign_model(names)
    if strange:
        return strange
    counted = [(sum(layout.find(name, "") is not None for name in names), layout) for layout in LAYOUTS]
    count, layout = max(counted, key=lambda pair: pair[0])
    if count and any(place[0].startswith("blocks.") for name in names if (place := layout.find(name, ""))):
        # which a text model may name as a ViT does
        patches = names_of(layout, "", "patch_embed.proj.weight")[0]
        return f"has {layout.schema}'s names of a ViT, but no {patches}"
    return f"no names of a Vision Transformer's patches and blocks; it has {', '.join(names[:3])}"


def _family(layout: Layout, prefix: str, state: State, found: Names) -> str:
    """What the model is, told by its tensors."""
    ours = found.state
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
    return "deit" if prefix == "deit." else "vit"


def _is_odd_square(table: Tensor) -> bool:
    """Whether a table has a row for the class token beside a square of patches."""
    patches = table.shape[1] - 1 if table.dim() == 3 else 0
    return patches > 0 and int(patches**0.5) ** 2 == patches


def _heads_of_flax(layout: Layout, state: State) -> dict[str, Any]:
    """Flax stores the heads apart, so that a file says how many there are."""
    kernel = state.get(names_of(layout, "", "blocks.0.attn.qkv.weight")[0])
    has_heads = layout.head_has_prefix and kernel is not None and kernel.dim() == 3
    return {"num_heads": kernel.shape[1]} if has_heads and kernel is not None else {}


def _set_aside(model: Model, found: Names) -> None:
    """Take out what goes with a part that FastViT lacks, and what only stands beside the model."""
    reason = next((reason for reason in found.refused.values() if takes_head(reason)), "")
    for ours in [name for name in found.state if reason and name.startswith("head.")]:
        del found.state[ours]
        names = names_of(model.layout, model.prefix, ours)
        found.refused.update(dict.fromkeys(names, f"reads what was refused; {reason}"))
    projection = [name for name, why in found.refused.items() if why == MANY_LAYERS and model.is_self_supervised]
    outside = [name for name in found.unknown if _BESIDE.match(name) or not name.startswith(model.prefix)]
    found.refused = {name: why for name, why in found.refused.items() if name not in projection}
    found.unknown = [name for name in found.unknown if name not in outside]
    found.beside += projection + outside


def _without_unused(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """The state, and what a folder of FastViT's keeps for the way back."""
    kept = {name.removeprefix(UNUSED): tensor for name, tensor in state.items() if name.startswith(UNUSED)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}, kept


def _unscanned(state: State) -> State:
    """Blocks that Flax has stacked into one, in a first dimension, taken apart."""
    scanned = "/encoderblock/"
    if not any(scanned in f"/{name}" for name in state):
        return state
    apart: State = {}
    for name, tensor in state.items():
        before, found, after = f"/{name}".partition(scanned)
        if not found or tensor.dim() == 0:
            apart[name] = tensor
            continue
        for index, part in enumerate(tensor):
            apart[f"{before}/encoderblock_{index}/{after}"[1:]] = part
    return apart


def expected_shapes(arguments: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of the model with these arguments; nothing is allocated."""
    from fastvit.model import VisionTransformer

    made = {**model_arguments(arguments), "device": "meta", "weight_init": "skip"}
    return {name: tensor.shape for name, tensor in VisionTransformer(**made).state_dict().items()}


def fitting(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> State:
    """The tensors that are floating point numbers of the right shape."""
    return {name: t for name, t in state.items() if shapes.get(name) == t.shape and t.is_floating_point()}


def _compare(recognised: Recognised, layout: Layout, prefix: str) -> None:
    """Fill in what is unknown, missing or misshapen, under the checkpoint's own names."""
    shapes = expected_shapes(recognised.arguments)
    already = set(recognised.missing)
    troubled = " ".join(recognised.misshapen)
    for ours, shape in shapes.items():
        names = names_of(layout, prefix, ours)
        tensor = recognised.state.get(ours)
        if tensor is None:
            missing = [name for name in names if name not in already and name not in troubled]
            # of parts, those that are there were never put together
            if not already.intersection(names):
                recognised.missing.extend(missing)
        elif not tensor.is_floating_point():
            recognised.misshapen.append(f"{' + '.join(names)}: {tensor.dtype}, expected floating point numbers")
        elif tensor.shape != shape:
            recognised.misshapen.append(
                f"{' + '.join(names)}: shape {list(tensor.shape)}, expected {list(shape)} as {ours}"
            )
    for ours in recognised.state.keys() - shapes.keys():
        recognised.unknown.extend(names_of(layout, prefix, ours))
    recognised.unknown.sort()
