"""What a config.json says about a model, in our arguments, and the one that goes with our model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvit.checkpoints.arguments import NORM_EPS, plain_size
from fastvit.checkpoints.errors import CheckpointError
from fastvit.model.arguments import POOLS
from fastvit.model.variants import list_models, variant_arguments

__all__ = ["ACTIVATIONS", "MODEL_TYPES", "family_of", "known_from", "sizes_from", "vision_config"]

# transformers' model types, and the families that they are to us.
MODEL_TYPES = {
    "vit": "vit",
    "deit": "deit",
    "vit_mae": "mae",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "clip_vision_model": "clip",
    "clip": "clip",
}
# transformers' names of activations; of several for ours the first is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Arguments of timm's models that `model_args` of its configs may have, and that are ours too.
_TIMM_ARGUMENTS = (
    "img_size", "num_heads", "class_token", "no_embed_class", "global_pool", "fc_norm", "act_layer",
    "pool_include_prefix", "init_values",
)  # fmt: skip


def family_of(config: Mapping[str, Any] | None) -> str:
    """The family that a config names, "" if it names none.

    Raises:
        CheckpointError: a model of transformers that FastViT can't read.
    """
    kind = (config or {}).get("model_type")
    if kind is None:
        return ""
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"model_type: {kind!r} is no model that FastViT reads; it reads {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[kind]


def vision_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a config that is about the image encoder."""
    inside = (config or {}).get("vision_config")
    return dict(inside if isinstance(inside, Mapping) else config or {})


def known_from(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments that a config gives: FastViT's own, transformers' or timm's.

    Raises:
        CheckpointError: an activation that FastViT does not have.
    """
    if not config:
        return {}
    if isinstance(config.get("fastvit"), Mapping):
        return dict(config["fastvit"])
    if "model_type" in config:
        return _from_transformers(vision_config(config))
    if "architecture" in config:
        return _from_timm(config)
    return {}


def _from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "in_chans": "num_channels",
        "no_embed_class": "no_embed_class",
    }
    known = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    for ours, theirs in (("img_size", "image_size"), ("patch_size", "patch_size")):
        if config.get(theirs) is not None:
            known[ours] = plain_size(config[theirs])
    activation = config.get("hidden_act")
    if activation is not None and not config.get("use_swiglu_ffn"):
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"hidden_act: {activation!r} is no activation of FastViT's; accepted: {', '.join(ACTIVATIONS)}"
            )
        known["act_layer"] = ACTIVATIONS[activation]
    return known


def _from_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(config["architecture"]).partition(".")[0]
    arguments = config.get("model_args") or {}
    known: dict[str, Any] = {}
    if name in list_models():  # of these FastViT knows every argument, the norm's eps and the activation too
        variant = variant_arguments(name)
        known = {"norm_eps": NORM_EPS, "num_heads": variant["num_heads"]}
        known["global_pool"] = variant.get("global_pool", "token")
        if "fc_norm" in variant:
            known["fc_norm"] = variant["fc_norm"]
        if "act_layer" not in variant:  # else the MLP's kind settles it
            known["act_layer"] = "gelu"
    if is_flexi(config):
        known["no_embed_class"] = True
    if "quickgelu" in name:
        known["act_layer"] = "quick_gelu"
    if config.get("global_pool") is not None:
        known["global_pool"] = config["global_pool"]
    known.update({key: arguments[key] for key in _TIMM_ARGUMENTS if arguments.get(key) is not None})
    if config.get("norm_eps") is not None:
        known["norm_eps"] = config["norm_eps"]
    if known.get("global_pool") not in POOLS:  # attention pooling is refused by its tensors' names
        known.pop("global_pool", None)
    return known


def is_flexi(config: Mapping[str, Any] | None) -> bool:
    """Whether timm's config names a FlexiViT, which was trained with bilinear resizing of patches and positions."""
    return "flexi" in str((config or {}).get("architecture", ""))


def sizes_from(config: Mapping[str, Any] | None) -> list[Any]:
    """Image sizes that timm's config names, though the weights may have another."""
    size = ((config or {}).get("pretrained_cfg") or {}).get("input_size")
    return [list(size[1:])] if isinstance(size, (list, tuple)) and len(size) == 3 else []
