"""Our tensors in another library's names, with the config that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastvit._version import __version__
from fastvit.checkpoints.arguments import NORM_EPS
from fastvit.checkpoints.configs import PLAIN, huggingface_class, huggingface_config, timm_config
from fastvit.checkpoints.errors import CheckpointError, listed
from fastvit.checkpoints.layouts import CLIP, HUGGINGFACE, TIMM, TORCHVISION
from fastvit.checkpoints.naming import UNUSED, State, write_names
from fastvit.checkpoints.recognition import KEPT, Recognised

SCHEMAS = ("timm", "torchvision", "huggingface", "huggingface-v5", "fastvit")

_FOLDED = {"cls_token", "cls_position"}  # parts of a class token that holds its own position


def to_schema(recognised: Recognised, schema: str) -> tuple[State, dict[str, Any] | None]:
    """A checkpoint's tensors in a library's names, and the config.json that goes with them.

    Args:
        recognised: without problems; see `Recognised.problems`.
        schema: one of `SCHEMAS`; "huggingface" has the names that the hub has, "huggingface-v5" those that models of
            transformers 5 have in memory.

    Returns:
        Names and tensors; and the config, None for torchvision, which has none.

    Raises:
        CheckpointError: the library can't express the model; the message names the arguments and what it has.
    """
    arguments = recognised.arguments
    if schema == "fastvit":
        return _fastvit(recognised)
    if schema == "timm":
        if arguments["pos_embed"] == "rotary":
            raise CheckpointError("timm's VisionTransformer can't express pos_embed='rotary'")
        return write_names(TIMM, "", recognised.state), timm_config(recognised.family, arguments)
    if schema == "torchvision":
        _check({**PLAIN, "qkv_bias": (True,), "act_layer": ("gelu",)}, "torchvision's ViT", arguments)
        return write_names(TORCHVISION, "", _with_class_position(recognised)), None
    return _huggingface(recognised, schema)


def _check(limits: Mapping[str, tuple[Any, ...]], name: str, arguments: Mapping[str, Any]) -> None:
    """Raise where a library's model can't have these arguments."""
    lost = [
        f"{key}={arguments[key]!r} (it has {' or '.join(map(repr, allowed))})"
        for key, allowed in limits.items()
        if arguments.get(key, allowed[0]) not in allowed
    ]
    if arguments["num_classes"] and arguments["global_pool"] != "token":
        lost.append(f"global_pool={arguments['global_pool']!r} before the head (it has 'token')")
    if lost:
        raise CheckpointError(f"{name} can't express {'; '.join(lost)}")


def _fastvit(recognised: Recognised) -> tuple[State, dict[str, Any]]:
    source = _source_config(recognised)
    config = {
        "library": f"fastvit {__version__}",
        "family": recognised.family,
        "fastvit": recognised.arguments,
        **({"source": source} if source else {}),
    }
    return {**recognised.state, **{KEPT + name: tensor for name, tensor in recognised.unused.items()}}, config


def _source_config(recognised: Recognised) -> dict[str, Any]:
    """transformers' config that the checkpoint came with, at first or second hand; else empty."""
    config = recognised.config or {}
    config = config.get("source", config) if "fastvit" in config else config
    return dict(config) if "model_type" in config else {}


def _huggingface(recognised: Recognised, schema: str) -> tuple[State, dict[str, Any]]:
    arguments = recognised.arguments
    kind = huggingface_class(recognised.family, arguments)
    name = f"transformers' {kind.name_for(arguments)}"
    _check(kind.limits, name, arguments)
    layout = HUGGINGFACE[schema, kind.layout + ("-swiglu" if arguments["mlp_layer"] == "swiglu" else "")]
    state = _with_class_position(recognised)
    for size in ("img_size", "patch_size"):
        if kind.layout != "vit" and not isinstance(arguments[size], int):
            raise CheckpointError(f"{size}={arguments[size]}: {name} has squares only")
    if kind.layout == "clip" and arguments["num_classes"]:
        layout = CLIP  # CLIPVisionModelWithProjection has version 4's names in version 5 too
        if not _is_zero(state.pop("head.bias")):
            raise CheckpointError(f"head.bias: {name} has a projection without a bias")
    prefix = layout.prefix if kind.layout == "clip" else kind.prefix_for(arguments)
    out = write_names(layout, prefix, state)
    for own, tensor in recognised.unused.items():
        theirs = "embeddings.mask_token" if own == "mask_token" else own
        if layout.meaning(theirs) == UNUSED and not (theirs.startswith("pooler.") and arguments["num_classes"]):
            out[prefix + theirs] = tensor
    mask = f"{prefix}embeddings.mask_token"
    if kind.model_type == "dinov2_with_registers":  # which always has one
        out.setdefault(mask, torch.zeros_like(state["cls_token"][0]))
    config = huggingface_config(kind, arguments, _source_config(recognised))
    if kind.layout == "dinov2":
        config["use_mask_token"] = mask in out
    if arguments["no_embed_class"] and not arguments["reg_tokens"]:
        config["no_embed_class"] = True  # so that the way back leaves out the row of zeros
    dtype = str(recognised.state["patch_embed.proj.weight"].dtype).removeprefix("torch.")
    return out, {**config, "dtype" if schema == "huggingface-v5" else "torch_dtype": dtype}


def _with_class_position(recognised: Recognised) -> State:
    """The state with a position for the class token, as libraries have it whose tables always have that row.

    It is the one that the checkpoint had, where it is known and the class token is still their sum; else zero.
    """
    arguments, state = recognised.arguments, dict(recognised.state)
    if not arguments["no_embed_class"] or not arguments["class_token"]:
        return state
    table, token = state["pos_embed"], state["cls_token"]
    position = torch.zeros_like(table[:, :1])
    own, its = recognised.unused.get("cls_token"), recognised.unused.get("cls_position")
    if own is not None and its is not None and _is_zero(own + its - token):
        token, position = own, its
    return {**state, "cls_token": token, "pos_embed": torch.cat([position, table], dim=1)}


def _is_zero(tensor: Tensor) -> bool:
    """Whether every element is zero; without data it may be."""
    return tensor.is_meta or not tensor.count_nonzero()


# ---- what is lost or must be known -----------------------------------------------------------------------------------


def remarks(recognised: Recognised, schema: str, written: Mapping[str, Tensor], with_config: bool) -> list[str]:
    """What a reader of the converted checkpoint has to know, a line each.

    Args:
        written: the names and tensors of `to_schema`.
        with_config: whether the config is written beside them.
    """
    return [*_left_out(recognised, schema, written), *_to_be_said(recognised.arguments, schema, with_config)]


def _left_out(recognised: Recognised, schema: str, written: Mapping[str, Tensor]) -> Iterator[str]:
    """What is in the checkpoint and not in the result, or the other way round."""
    unused, no_position = recognised.unused.keys(), recognised.arguments["no_embed_class"]
    lost = sorted(name for name in unused - _FOLDED if not any(key.endswith(name) for key in written))
    if lost:
        yield f"left out, not used by the encoder: {', '.join(lost)}"
    if recognised.beside:
        yield f"left out, another part of the model: {listed(recognised.beside)}"
    if schema in ("timm", "torchvision") and unused & _FOLDED:
        yield "pos_embed: the class token's own position was added to it"
    if schema not in ("timm", "fastvit") and no_position and not unused & _FOLDED:
        yield "pos_embed: the class token got a position of zeros"
    if any(key.endswith("mask_token") for key in written) and not any("mask_token" in name for name in unused):
        yield "mask_token: zeros, since the model has one and the checkpoint has none"


def _to_be_said(arguments: Mapping[str, Any], schema: str, with_config: bool) -> Iterator[str]:
    """What the caller has to say when the result is loaded, because its format does not."""
    if not with_config:
        said = ("num_heads", "img_size", "norm_eps", "act_layer", "global_pool")
        yield "not in the file: " + ", ".join(f"{name}={arguments[name]!r}" for name in said)
    eps = arguments["norm_eps"]
    if schema in ("timm", "torchvision") and eps != NORM_EPS:
        yield f"norm_eps={eps}: build {schema}'s model with norm_layer=partial(nn.LayerNorm, eps={eps})"
    if schema == "timm" and arguments["mlp_layer"] == "swiglu":
        yield "mlp_layer: build timm's model with mlp_layer=SwiGLUPacked and act_layer=nn.SiLU"
    if schema == "torchvision" and not arguments["num_classes"]:
        yield "no head: torchvision's model has one; put nn.Identity() in the place of `heads`"
