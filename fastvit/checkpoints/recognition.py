"""What a checkpoint is: whose names it has, which model it fits, and what of it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvit.checkpoints.arguments import arguments_of, fold_class_position, model_arguments
from fastvit.checkpoints.configs import family_of, known_from, sizes_from
from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.files import Checkpoint
from fastvit.checkpoints.foreign import foreign_features, foreign_model
from fastvit.checkpoints.layouts import LAYOUTS, takes_head
from fastvit.checkpoints.naming import Layout, Names, State, names_of, read_names

__all__ = ["Recognised", "expected_shapes", "fitting", "recognise"]

UNUSED = "unused."  # FastViT's own folders keep what the model does not use under this

# What a library's code takes where its files do not say. JAX's gelu is the approximation by tanh.
_CONVENTIONS: dict[str, dict[str, Any]] = {
    "timm": {"norm_eps": 1e-6, "act_layer": "gelu"},
    "torchvision": {"norm_eps": 1e-6, "act_layer": "gelu"},
    "huggingface": {"norm_eps": 1e-12, "act_layer": "gelu"},
    "jax": {"norm_eps": 1e-6, "act_layer": "gelu_tanh"},
}
# What a library's classes have in any case.
_FIXED: dict[str, dict[str, Any]] = {
    "torchvision": {"act_layer": "gelu", "global_pool": "token"},
    "huggingface": {"global_pool": "token"},
}
_OF_FAMILY: dict[tuple[str, str], dict[str, Any]] = {
    ("timm", "clip"): {"norm_eps": 1e-5},
    ("huggingface", "clip"): {"norm_eps": 1e-5, "act_layer": "quick_gelu"},
    ("huggingface", "dinov2"): {"norm_eps": 1e-6},
}
_LIBRARIES = {"fastvit": "timm", "huggingface-v5": "huggingface", "big_vision": "jax"}


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

    @property
    def problems(self) -> list[str]:
        """Everything that keeps the checkpoint from being this model, a line each."""
        return [
            *(f"{name}: {reason}" for name, reason in self.refused.items()),
            *(f"{name}: unknown" for name in self.unknown),
            *(f"{name}: missing" for name in self.missing),
            *self.misshapen,
        ]


def recognise(checkpoint: Checkpoint, *, size_hint: Any = None, **known: Any) -> Recognised:
    """Say what a checkpoint is, and bring it into our names.

    Args:
        checkpoint: from `read_checkpoint`.
        size_hint: an image size to try where the checkpoint's positions fill no square and nothing else says it.
        known: arguments of the checkpoint's model that it does not say, such as `num_heads` or `img_size`; they win
            over what it does say.

    Raises:
        CheckpointError: another architecture; the message says what it seems to be, and why it is not read.
    """
    try:
        return _recognise(checkpoint, known, size_hint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.source}: {error}") from error


def _recognise(checkpoint: Checkpoint, known: Mapping[str, Any], size_hint: Any) -> Recognised:
    family = family_of(checkpoint.config)
    state, kept = _without_unused(checkpoint.state)
    state = _unscanned(state)
    layout, prefix = _layout_of(state)
    found = read_names(layout, prefix, state)
    _refuse_heads(layout, prefix, found)
    if "patch_embed.proj.weight" not in found.state:  # its name is there, so that only its shape can be wrong
        raise CheckpointError("; ".join(found.misshapen))
    if layout.projection and "head.weight" in found.state:
        weight = found.state["head.weight"]
        found.state["head.bias"] = torch.zeros(weight.shape[:1], dtype=weight.dtype)
    is_ours = "fastvit" in (checkpoint.config or {})
    schema = "fastvit" if is_ours else layout.schema
    family = family or str((checkpoint.config or {}).get("family", "")) or _family(layout, prefix, state, found)
    library = _LIBRARIES.get(schema, schema)
    given = {
        **_FIXED.get(library, {}),
        **_heads_of_flax(layout, prefix, state),
        **known_from(checkpoint.config),
        **known,
    }
    conventions = {**_CONVENTIONS[library], **_OF_FAMILY.get((library, family), {})}
    sizes = sizes_from(checkpoint.config) + ([] if size_hint is None else [size_hint])
    arguments, assumed = arguments_of(found.state, given, conventions, sizes)
    tensors, parts = fold_class_position(found.state, arguments)
    if tensors is not found.state:
        arguments["no_embed_class"] = True
    recognised = Recognised(
        schema=schema,
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
    )
    _compare(recognised, layout, prefix)
    return recognised


def _layout_of(state: State) -> tuple[Layout, str]:
    """The layout and prefix that most names belong to.

    Raises:
        CheckpointError: there is none, or the model has more than names can say.
    """
    strange = foreign_features(state)
    if strange:
        raise CheckpointError(strange)
    candidates = [(layout, prefix) for layout in LAYOUTS for prefix in layout.prefixes]
    places = [[place for name in state if (place := layout.find(name, prefix))] for layout, prefix in candidates]
    best = max(range(len(candidates)), key=lambda index: len(places[index]))
    layout, prefix = candidates[best]
    ours = {place.ours for place in places[best]}
    has_blocks = any(name.startswith("blocks.") for name in ours)
    if has_blocks and "patch_embed.proj.weight" in ours:
        return layout, prefix
    strange = foreign_model(state)
    if not strange and has_blocks:  # which a text model may name as a ViT does
        name = names_of(layout, prefix, "patch_embed.proj.weight")[0]
        strange = f"has {layout.schema}'s names of a ViT, but no {name}"
    if not strange:
        strange = f"no names of a Vision Transformer's patches and blocks; it has {', '.join(list(state)[:3])}"
    raise CheckpointError(strange)


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


def _heads_of_flax(layout: Layout, prefix: str, state: State) -> dict[str, Any]:
    """Flax stores the heads apart, so that a file says how many there are."""
    if not layout.head_has_prefix:
        return {}
    name = names_of(layout, prefix, "blocks.0.attn.qkv.weight")[0]
    kernel = state.get(name)
    return {"num_heads": kernel.shape[1]} if kernel is not None and kernel.dim() == 3 else {}


def _refuse_heads(layout: Layout, prefix: str, found: Names) -> None:
    """A head behind a part that FastViT lacks is refused with it."""
    reason = next((reason for reason in found.refused.values() if takes_head(reason)), "")
    for ours in [name for name in found.state if reason and name.startswith("head.")]:
        del found.state[ours]
        found.refused.update(dict.fromkeys(names_of(layout, prefix, ours), f"reads what was refused; {reason}"))


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
