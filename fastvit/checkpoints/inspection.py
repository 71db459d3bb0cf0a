"""What a checkpoint is and which model it fits, told before anything is built from it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor

from fastvit.model import VisionTransformer
from fastvit.model.patch_embed import pair
from fastvit.model.variants import variant_arguments

from .arguments import nearest_variant
from .configs import huggingface_class
from .errors import CheckpointError, listed
from .files import Checkpoint, read_checkpoint
from .recognition import Recognised, recognise
from .targets import SCHEMAS, to_schema

# Where two models differ, as far as they are compared.
_COMPARED = (
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "num_heads", "mlp_ratio", "class_token",
    "reg_tokens", "no_embed_class", "pre_norm", "qkv_bias", "qk_norm", "init_values",
)  # fmt: skip
# Whose names they are, and the class that has them.
_CLASSES = {
    "fastvit": "fastvit.VisionTransformer",
    "timm": "timm.models.VisionTransformer",
    "torchvision": "torchvision.models.VisionTransformer",
    "jax": "vision_transformer's VisionTransformer (Flax)",
    "big_vision": "big_vision.models.vit (Flax)",
}
_KINDS = {"torch": "torch.save", "npz": "JAX's .npz"}


@dataclass(frozen=True)
class Inspection:
    """What was found; `str()` of it is for people, `to_dict()` for programs.

    Attributes:
        source, kind: as of the `Checkpoint`.
        tensors, values, bytes: how many tensors, numbers in them, and bytes these take.
        dtypes: numbers by dtype, such as {"float32": 5717416}.
        config: what the config beside the weights says it is of; "" without one.
        notes, schema, family, assumed, beside: as of `Recognised`: where in the checkpoint the model was, whose names
            it has, what it is, what it does not say and was taken, and what is left out.
        library_class: the class of its own library that it fits.
        arguments: of `fastvit.VisionTransformer`, as JSON can hold them.
        parameters: of the model with these arguments.
        variant: the nearest of `fastvit.model.list_models()`.
        differences: arguments in which the checkpoint differs from it: (the checkpoint's, the variant's).
        problems: what keeps `load_pretrained` from loading it; empty: it loads.
        unused: names of what takes no part in the output.
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
    contents = _contents(checkpoint)
    try:
        recognised = recognise(checkpoint, key=key)
    except CheckpointError as error:
        return Inspection(**contents, problems=[str(error)])
    arguments = recognised.arguments
    variant = nearest_variant(arguments, recognised.family)
    shared = ("notes", "schema", "family", "arguments", "assumed", "problems", "beside")
    return Inspection(
        **contents,
        **{name: getattr(recognised, name) for name in shared},
        library_class=_library_class(recognised),
        parameters=sum(tensor.numel() for tensor in recognised.state.values()),
        variant=variant,
        differences=_differences(arguments, variant) if variant else {},
        unused=sorted(recognised.unused),
        targets={} if recognised.problems else {schema: _why_not(recognised, schema) for schema in SCHEMAS},
    )


def _contents(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = checkpoint.state.values()
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return {
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "tensors": len(tensors),
        "values": dtypes.total(),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(dtypes.most_common()),
        "config": _config(checkpoint.config),
    }


def _config(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return ""
    for key, library in (("model_type", "transformers"), ("architecture", "timm")):
        if key in config:
            return f"{library}, {config[key]}"
    return "FastViT's" if "fastvit" in config else "of no library that FastViT knows"


def _library_class(recognised: Recognised) -> str:
    if recognised.schema.startswith("huggingface"):
        named = (recognised.config or {}).get("architectures")
        is_named = isinstance(named, Sequence) and named and isinstance(named[0], str)
        own = huggingface_class(recognised.family, recognised.arguments)
        return f"transformers.{named[0] if named and is_named else own.name_for(recognised.arguments)}"
    if recognised.schema == "timm" and recognised.family == "deit-distilled":
        return "timm.models.deit.VisionTransformerDistilled"
    return _CLASSES[recognised.schema]


def _differences(arguments: Mapping[str, Any], variant: str) -> dict[str, tuple[Any, Any]]:
    """What the checkpoint and the named model have, where it is not the same."""
    defaults = {name: parameter.default for name, parameter in signature(VisionTransformer).parameters.items()}
    theirs = {**defaults, **variant_arguments(variant)}
    alike = {
        "init_values": bool(arguments["init_values"]) == bool(theirs["init_values"]),
        # of SwiGLU and odd sizes the ratio is known to rounding only
        "mlp_ratio": round(arguments["mlp_ratio"] * arguments["embed_dim"])
        == int(theirs["mlp_ratio"] * arguments["embed_dim"]),
    }
    return {
        name: (arguments[name], theirs[name])
        for name in _COMPARED
        if not alike.get(name, arguments[name] == theirs[name])
    }


def _why_not(recognised: Recognised, schema: str) -> str:
    """Tried; names change and tensors are split, which copies next to nothing."""
    try:
        to_schema(recognised, schema)
    except CheckpointError as error:
        return str(error)
    return ""


# Text


def _lines(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "checkpoint", f"{found.source} ({_KINDS.get(found.kind, found.kind)})"
    dtypes = ", ".join(dtype if len(found.dtypes) == 1 else f"{n:,} {dtype}" for dtype, n in found.dtypes.items())
    yield "contents", f"{found.tensors} tensors, {found.values:,} numbers, {dtypes}, {found.bytes / 1e6:,.1f} MB"
    yield from _under("", found.notes)
    yield from _under("config", [found.config] if found.config else [])
    if found.schema:
        yield from _model_lines(found)
    more = [f"and {len(found.problems) - 6} more"] if len(found.problems) > 6 else []
    yield from _under("problems", [*found.problems[:6], *more])
    if not found.loads:
        way_out = "; load_pretrained(..., strict=False) leaves out, or starts afresh, what does not fit"
        yield "FastViT", f"does not load it{' as it is' + way_out if found.schema else ''}"
        return
    yield "FastViT", "loads it: fastvit.load_pretrained(...)"
    yield "", f"converts it to {', '.join(schema for schema, reason in found.targets.items() if not reason)}"
    yield from _under("", [f"not to {schema}: {reason}" for schema, reason in found.targets.items() if reason])


def _model_lines(found: Inspection) -> Iterator[tuple[str, str]]:
    a = found.arguments
    yield "names", f"{found.schema} (family {found.family})"
    yield "fits", f"{found.library_class}, {found.parameters:,} parameters"
    different = [f"with {name}={ours!r} instead of {theirs!r}" for name, (ours, theirs) in found.differences.items()]
    yield from _under("nearest", [found.variant, *different] if found.variant else [])
    hidden = round(a["mlp_ratio"] * a["embed_dim"])
    yield (
        "sizes",
        f"width {a['embed_dim']}, depth {a['depth']}, {a['num_heads']} heads, MLP {hidden} ({a['mlp_layer']})",
    )
    classes = f"{a['num_classes']} classes" if a["num_classes"] else "no head"
    yield "images", f"{_size(a['img_size'])}, patches {_size(a['patch_size'])}, {a['in_chans']} channels; {classes}"
    tokens = "a class token" if a["class_token"] else "no class token"
    tokens += f", {a['reg_tokens']} registers" if a["reg_tokens"] else ""
    positions = {"learn": "learned", "sincos": "sine and cosine", "rotary": "rotary"}.get(a["pos_embed"], "no")
    yield "tokens", f"{tokens}, {positions} positions; pooling: {a['global_pool'] or 'none'}"
    said = "assumed" if any(line.startswith("norm_eps=") for line in found.assumed) else "as the config says"
    yield "norms", f"{a['norm_layer']}, eps {a['norm_eps']:g} ({said})"
    yield from _under("assumed", found.assumed)
    yield from _under("left out", [listed(found.beside)] if found.beside else [])
    yield from _under("unused", [listed(found.unused)] if found.unused else [])


def _under(heading: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for index, line in enumerate(lines):
        yield ("" if index else heading), line


def _size(size: int | Sequence[int]) -> str:
    return " x ".join(map(str, pair("size", size)))
