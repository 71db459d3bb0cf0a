"""Our tensors in another library's names, with the config that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastvit._version import __version__
from fastvit.checkpoints.arguments import NORM_EPS, nearest_variant, plain_size
from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.huggingface import huggingface_config, huggingface_kind
from fastvit.checkpoints.layouts import CLIP, TIMM, TORCHVISION, layout_named
from fastvit.checkpoints.naming import State, write_names
from fastvit.checkpoints.recognition import UNUSED, Recognised

__all__ = ["SCHEMAS", "remarks", "to_schema"]

SCHEMAS = ("timm", "torchvision", "huggingface", "huggingface-v5", "fastvit")

# What a library's model may be, argument by argument; what is not named may be anything.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "class_token": (True,),
    "reg_tokens": (0,),
    "init_values": (None,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "fc_norm": (False,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "embed_norm_layer": (None,),
    "norm_layer": ("layernorm",),
    "mlp_layer": ("mlp",),
    "proj_bias": (True,),
    "pos_embed": ("learn",),
}
_LIMITS: dict[str, dict[str, tuple[Any, ...]]] = {
    "torchvision": {**_PLAIN, "qkv_bias": (True,), "act_layer": ("gelu",)},
    "vit": _PLAIN,
    "mae": _PLAIN,
    "deit": {**_PLAIN, "reg_tokens": (1,), "no_embed_class": (False,)},
    "dinov2": {name: of for name, of in _PLAIN.items() if name not in ("init_values", "mlp_layer")},
    "dinov2_with_registers": {
        **{name: of for name, of in _PLAIN.items() if name not in ("init_values", "mlp_layer", "reg_tokens")},
        "no_embed_class": (True,),
    },
    "clip": {**_PLAIN, "pre_norm": (True,), "qkv_bias": (True,)},
}


def to_schema(recognised: Recognised, schema: str) -> tuple[State, dict[str, Any] | None]:
    """A checkpoint's tensors in a library's names, and the config.json that goes with them.

    Args:
        recognised: without problems; see `Recognised.problems`.
        schema: "timm", "torchvision", "huggingface" (the names that the hub has), "huggingface-v5" (those that
            models of transformers 5 have in memory) or "fastvit".

    Returns:
        Names and tensors; and the config, None for torchvision, which has none.

    Raises:
        CheckpointError: the library can't express the model; the message names the arguments and what it has.
        ValueError: `schema` is not known.
    """
    if schema not in SCHEMAS:
        raise ValueError(f"schema: {schema!r} is not known; accepted: {', '.join(SCHEMAS)}")
    if schema == "fastvit":
        return _fastvit(recognised)
    if schema == "timm":
        return write_names(TIMM, "", recognised.state), _timm_config(recognised)
    if schema == "torchvision":
        _check("torchvision", "torchvision's ViT", recognised.arguments)
        return write_names(TORCHVISION, "", _with_class_position(recognised)), None
    return _huggingface(recognised, schema)


def _check(target: str, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise where a library's model can't have these arguments."""
    lost = [
        f"{key}={arguments[key]!r} (it has {' or '.join(map(repr, allowed))})"
        for key, allowed in _LIMITS[target].items()
        if arguments.get(key, allowed[0]) not in allowed
    ]
    if arguments["num_classes"] and arguments["global_pool"] != "token":
        lost.append(f"global_pool={arguments['global_pool']!r} before the head (it has 'token')")
    if lost:
        raise CheckpointError(f"{name} can't express {'; '.join(lost)}")


# ---- FastViT and timm --------------------------------------------------------------------------------------------


def _fastvit(recognised: Recognised) -> tuple[State, dict[str, Any]]:
    config: dict[str, Any] = {
        "library": f"fastvit {__version__}",
        "family": recognised.family,
        "fastvit": recognised.arguments,
    }
    source = source_config(recognised)
    if source:
        config["source"] = source
    return {**recognised.state, **{UNUSED + name: tensor for name, tensor in recognised.unused.items()}}, config


def source_config(recognised: Recognised) -> dict[str, Any]:
    """transformers' config that the checkpoint came with, at first or second hand; else empty."""
    config = recognised.config or {}
    config = config.get("source", config) if "fastvit" in config else config
    return dict(config) if "model_type" in config else {}


def _timm_config(recognised: Recognised) -> dict[str, Any]:
    arguments = recognised.arguments
    height_width = arguments["img_size"]
    height, width = (height_width, height_width) if isinstance(height_width, int) else height_width
    model_args = {key: value for key, value in arguments.items() if key not in ("norm_eps", "num_classes", "mlp_layer")}
    if model_args.get("norm_layer") == "layernorm":
        del model_args["norm_layer"]
    return {
        "architecture": nearest_variant(arguments, _NAMED.get(recognised.family, "")) or "vit_base_patch16_224",
        "num_classes": arguments["num_classes"],
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": {key: value for key, value in model_args.items() if value is not None},
        "norm_eps": arguments["norm_eps"],
        "pretrained_cfg": {
            "num_classes": arguments["num_classes"],
            "input_size": [arguments["in_chans"], height, width],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


_NAMED = {"deit": "deit_", "deit3": "deit3_"}  # families whose timm names do not start with vit_


# ---- transformers ------------------------------------------------------------------------------------------------


def _huggingface(recognised: Recognised, schema: str) -> tuple[State, dict[str, Any]]:
    arguments = recognised.arguments
    kind = huggingface_kind(recognised.family, arguments)
    _check(kind.limits, f"transformers' {kind.model_class}", arguments)
    swiglu = arguments["mlp_layer"] == "swiglu"
    layout = layout_named(schema, kind.layout, swiglu)
    state = _with_class_position(recognised)
    if kind.layout in ("dinov2", "clip"):
        for name in ("img_size", "patch_size"):
            if not isinstance(plain_size(arguments[name]), int):
                raise CheckpointError(f"{name}={arguments[name]}: transformers' {kind.model_class} has squares only")
    if kind.layout == "clip":
        if arguments["num_classes"]:
            layout = CLIP  # CLIPVisionModelWithProjection has version 4's names in version 5 too
            if not _is_zero(state.pop("head.bias")):
                raise CheckpointError(f"head.bias: transformers' {kind.model_class} has a projection without a bias")
    prefix = "vision_model." if layout is CLIP else kind.prefix
    out = write_names(layout, prefix, state)
    unused = {f"embeddings.{name}" if name == "mask_token" else name: t for name, t in recognised.unused.items()}
    for name, tensor in unused.items():
        wanted = name == "embeddings.mask_token" or name.startswith("pooler.") and not arguments["num_classes"]
        if wanted and name in _expanded(layout.unused):
            out[prefix + name] = tensor
    if kind.model_type == "dinov2_with_registers":  # which always has one
        out.setdefault(f"{prefix}embeddings.mask_token", torch.zeros_like(state["cls_token"][0]))
    config = huggingface_config(kind, arguments, source_config(recognised), _dtype_name(recognised.state))
    if kind.layout == "dinov2":
        config["use_mask_token"] = f"{prefix}embeddings.mask_token" in out
    if arguments["no_embed_class"] and not arguments["reg_tokens"]:
        config["no_embed_class"] = True  # so that the way back leaves out the row of zeros
    config["dtype" if schema == "huggingface-v5" else "torch_dtype"] = _dtype_name(recognised.state)
    return out, config


def _expanded(patterns: tuple[str, ...]) -> set[str]:
    return {pattern.replace("*", kind) for pattern in patterns for kind in ("weight", "bias")}


def _dtype_name(state: State) -> str:
    return str(state["patch_embed.proj.weight"].dtype).removeprefix("torch.")


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


# ---- what is lost or must be known -------------------------------------------------------------------------------


def remarks(recognised: Recognised, schema: str, written: Mapping[str, Tensor], with_config: bool) -> list[str]:
    """What a reader of the converted checkpoint has to know, a line each.

    Args:
        written: the names and tensors of `to_schema`.
        with_config: whether the config is written beside them.
    """
    return [*_left_out(recognised, schema, written), *_to_be_said(recognised.arguments, schema, with_config)]


def _left_out(recognised: Recognised, schema: str, written: Mapping[str, Tensor]) -> list[str]:
    """What is in the checkpoint and not in the result, or the other way round."""
    arguments, lines = recognised.arguments, []
    ends = tuple(written)
    lost = [name for name in recognised.unused if not any(key.endswith(name) for key in ends)]
    lost = sorted(name for name in lost if name not in _FOLDED)
    if lost:
        lines.append(f"left out, not used by the encoder: {', '.join(lost)}")
    if recognised.beside:
        lines.append(f"left out, another part of the model: {_some(recognised.beside)}")
    if schema in ("timm", "torchvision") and recognised.unused.keys() & _FOLDED:
        lines.append("pos_embed: the class token's own position was added to it")
    if schema not in ("timm", "fastvit") and arguments["no_embed_class"] and not recognised.unused.keys() & _FOLDED:
        lines.append("pos_embed: the class token got a position of zeros")
    if any(key.endswith("mask_token") for key in ends) and not any("mask_token" in name for name in recognised.unused):
        lines.append("mask_token: zeros, since the model has one and the checkpoint has none")
    return lines


def _to_be_said(arguments: Mapping[str, Any], schema: str, with_config: bool) -> list[str]:
    """What the caller has to say when the result is loaded, because its format does not."""
    lines = []
    if not with_config:
        said = ("num_heads", "img_size", "norm_eps", "act_layer", "global_pool")
        lines.append("not in the file: " + ", ".join(f"{name}={arguments[name]!r}" for name in said))
    eps = arguments["norm_eps"]
    if schema in ("timm", "torchvision") and eps != NORM_EPS:
        lines.append(f"norm_eps={eps}: build {schema}'s model with norm_layer=partial(nn.LayerNorm, eps={eps})")
    if schema == "timm" and arguments["mlp_layer"] == "swiglu":
        lines.append("mlp_layer: build timm's model with mlp_layer=SwiGLUPacked and act_layer=nn.SiLU")
    if schema == "torchvision" and not arguments["num_classes"]:
        lines.append("no head: torchvision's model has one; put nn.Identity() in the place of `heads`")
    return lines


_FOLDED = {"cls_token", "cls_position"}  # parts of a class token that holds its own position


def _some(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
