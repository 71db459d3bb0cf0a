"""What a checkpoint is and which model it fits, told before anything is built from it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from fastvit.model.variants import variant_arguments

from .arguments import nearest_variant
from .errors import CheckpointError
from .files import read_checkpoint
from .huggingface import huggingface_kind
from .recognition import Recognised, recognise
from .targets import SCHEMAS, to_schema

__all__ = ["Inspection", "inspect"]

LISTED = 6  # names in a line, at most

# What a named model takes where its own arguments say nothing, as far as two models are compared.
_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "num_classes": 1000,
    "global_pool": "token",
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "class_token": True,
    "reg_tokens": 0,
    "no_embed_class": False,
    "pre_norm": False,
    "qkv_bias": True,
    "qk_norm": False,
}
# Whose names they are, and the class that has them.
_CLASSES = {
    "fastvit": "fastvit.VisionTransformer",
    "timm": "timm.models.VisionTransformer",
    "torchvision": "torchvision.models.VisionTransformer",
    "jax": "vision_transformer's VisionTransformer (Flax)",
    "big_vision": "big_vision.models.vit (Flax)",
}


@dataclass(frozen=True)
class Inspection:
    """What was found; `str()` of it is for people, `to_dict()` for programs.

    Attributes:
        source, kind: as of the `Checkpoint`. notes: as of `Recognised`.
        tensors, values, bytes: how many tensors, numbers in them, and bytes these take.
        dtypes: numbers by dtype, such as {"float32": 5717416}.
        config: what the config beside the weights says it is of; "" without one.
        schema, family: whose names the checkpoint has and what model it is, as of `Recognised`.
        library_class: the class of its own library that it fits.
        arguments: of `fastvit.VisionTransformer`, as JSON can hold them.
        parameters: of the model with these arguments.
        variant: the nearest of `fastvit.model.list_models()`.
        differences: arguments in which the checkpoint differs from it: (the checkpoint's, the variant's).
        assumed: what the checkpoint does not say and was taken.
        problems: what keeps `load_pretrained` from loading it; empty: it loads.
        beside, unused: names of what is left out, and of what takes no part in the output.
        targets: for each schema that `convert` writes, "" or why it can't be written.
    """

    source: str
    kind: str
    tensors: int
    values: int
    bytes: int
    dtypes: dict[str, int]
    config: str
    notes: tuple[str, ...] = ()
    schema: str = ""
    family: str = ""
    library_class: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    variant: str = ""
    differences: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)

    @property
    def loads(self) -> bool:
        """Whether `fastvit.load_pretrained` takes it as it is."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**asdict(self), "loads": self.loads}

    def __str__(self) -> str:
        return "\n".join(f"{heading:<13} {text}" for heading, text in _lines(self))


def inspect(
    source: str | os.PathLike[str] | Mapping[str, Tensor], *, key: str | None = None, allow: Sequence[str] = ()
) -> Inspection:
    """Say what a checkpoint is; a model of another architecture is a finding too, under `problems`.

    Args:
        source: what `read_checkpoint` takes: a file, a folder, a state_dict or a name on the hub.
        key, allow: as in `load_pretrained`.

    Raises:
        CheckpointError, TypeError, ImportError: it can't be read.
    """
    checkpoint = read_checkpoint(source, allow=allow)
    found = Inspection(
        source=checkpoint.source,
        kind=checkpoint.kind,
        tensors=len(checkpoint.state),
        values=sum(tensor.numel() for tensor in checkpoint.state.values()),
        bytes=sum(tensor.nbytes for tensor in checkpoint.state.values()),
        dtypes=_dtypes(checkpoint.state),
        config=_config(checkpoint.config),
    )
    try:
        recognised = recognise(checkpoint, key=key)
    except CheckpointError as error:
        return replace(found, problems=[str(error).removeprefix(f"{checkpoint.source}: ")])
    return _described(found, recognised)


def _described(found: Inspection, recognised: Recognised) -> Inspection:
    arguments = recognised.arguments
    variant = nearest_variant(arguments, {"deit": "deit_", "deit3": "deit3_"}.get(recognised.family, ""))
    return replace(
        found,
        notes=recognised.notes,
        schema=recognised.schema,
        family=recognised.family,
        library_class=_library_class(recognised),
        arguments=arguments,
        parameters=sum(tensor.numel() for tensor in recognised.state.values()),
        variant=variant,
        differences=_differences(arguments, variant) if variant else {},
        assumed=recognised.assumed,
        problems=recognised.problems,
        beside=recognised.beside,
        unused=sorted(recognised.unused),
        targets={} if recognised.problems else _targets(recognised),
    )


def _dtypes(state: Mapping[str, Tensor]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for tensor in state.values():
        counted[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counted.most_common())


def _config(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return ""
    for key, library in (("model_type", "transformers"), ("architecture", "timm")):
        if key in config:
            return f"{library}, {config[key]}"
    return "FastViT's" if "fastvit" in config else "of no library that FastViT knows"


def _library_class(recognised: Recognised) -> str:
    named = (recognised.config or {}).get("architectures")
    if recognised.schema.startswith("huggingface"):
        if isinstance(named, Sequence) and named and isinstance(named[0], str):
            return f"transformers.{named[0]}"
        return f"transformers.{huggingface_kind(recognised.family, recognised.arguments).model_class}"
    if recognised.schema == "timm" and recognised.family == "deit-distilled":
        return "timm.models.deit.VisionTransformerDistilled"
    return _CLASSES[recognised.schema]


def _differences(arguments: Mapping[str, Any], variant: str) -> dict[str, tuple[Any, Any]]:
    theirs = {**_DEFAULTS, **variant_arguments(variant)}
    differing = {}
    for name in _DEFAULTS:
        if name == "mlp_ratio":  # of SwiGLU and odd sizes the ratio is known to rounding only
            same = round(arguments[name] * arguments["embed_dim"]) == int(theirs[name] * arguments["embed_dim"])
        else:
            same = arguments[name] == theirs[name]
        if not same:
            differing[name] = (arguments[name], theirs[name])
    if bool(arguments["init_values"]) != bool(theirs.get("init_values")):
        differing["init_values"] = (arguments["init_values"], theirs.get("init_values"))
    return differing


def _targets(recognised: Recognised) -> dict[str, str]:
    """Tried; names change and tensors are split, which copies next to nothing."""
    reasons = {}
    for schema in SCHEMAS:
        try:
            to_schema(recognised, schema)
            reasons[schema] = ""
        except CheckpointError as error:
            reasons[schema] = str(error)
    return reasons


# Text


def _lines(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "checkpoint", f"{found.source} ({_KINDS[found.kind]})"
    dtypes = ", ".join(dtype if len(found.dtypes) == 1 else f"{n:,} {dtype}" for dtype, n in found.dtypes.items())
    yield "contents", f"{found.tensors} tensors, {found.values:,} numbers, {dtypes}, {found.bytes / 1e6:,.1f} MB"
    for note in found.notes:
        yield "", note
    if found.config:
        yield "config", found.config
    if found.schema:
        yield from _model_lines(found)
    for index, problem in enumerate(found.problems[:LISTED]):
        yield ("problems" if index == 0 else ""), problem
    if len(found.problems) > LISTED:
        yield "", f"and {len(found.problems) - LISTED} more"
    yield from _use_lines(found)


def _model_lines(found: Inspection) -> Iterator[tuple[str, str]]:
    a = found.arguments
    assumed = {line.partition("=")[0] for line in found.assumed}
    yield "names", f"{found.schema} (family {found.family})"
    yield "fits", f"{found.library_class}, {found.parameters:,} parameters"
    if found.variant:
        yield "nearest", found.variant
        for name, (ours, theirs) in found.differences.items():
            yield "", f"with {name}={ours!r} instead of {theirs!r}"
    hidden = round(a["mlp_ratio"] * a["embed_dim"])
    yield (
        "sizes",
        f"width {a['embed_dim']}, depth {a['depth']}, {a['num_heads']} heads, MLP {hidden} ({a['mlp_layer']})",
    )
    classes = f"{a['num_classes']} classes" if a["num_classes"] else "no head"
    yield "images", f"{_size(a['img_size'])}, patches {_size(a['patch_size'])}, {a['in_chans']} channels; {classes}"
    tokens = ["a class token"] if a["class_token"] else ["no class token"]
    tokens += [f"{a['reg_tokens']} registers"] if a["reg_tokens"] else []
    pooling = a["global_pool"] or "none"
    yield "tokens", f"{', '.join(tokens)}, {_POSITIONS[a['pos_embed']]}; pooling: {pooling}"
    said = "assumed" if "norm_eps" in assumed else "as the config says"
    yield "norms", f"{a['norm_layer']}, eps {a['norm_eps']:g} ({said})"
    for index, line in enumerate(found.assumed):
        yield ("assumed" if index == 0 else ""), line
    if found.beside:
        yield "left out", _listed(found.beside)
    if found.unused:
        yield "unused", _listed(found.unused)


def _use_lines(found: Inspection) -> Iterator[tuple[str, str]]:
    if not found.loads:
        way_out = "; load_pretrained(..., strict=False) leaves out, or starts afresh, what does not fit"
        yield "FastViT", f"does not load it{' as it is' + way_out if found.schema else ''}"
        return
    yield "FastViT", "loads it: fastvit.load_pretrained(...)"
    able = [schema for schema, reason in found.targets.items() if not reason]
    yield "", f"converts it to {', '.join(able)}"
    for schema, reason in found.targets.items():
        if reason:
            yield "", f"not to {schema}: {reason}"


_POSITIONS = {
    "learn": "learned positions",
    "sincos": "sine and cosine positions",
    "": "no positions",
    "none": "no positions",
}
_KINDS = {
    "safetensors": "safetensors",
    "torch": "torch.save",
    "folder": "folder",
    "npz": "JAX's .npz",
    "state_dict": "state_dict",
}


def _size(size: int | Sequence[int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
