"""transformers' classes for our models, and their configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvit.checkpoints.arguments import plain_size
from fastvit.checkpoints.configs import ACTIVATIONS, vision_config
from fastvit.checkpoints.errors import CheckpointError

__all__ = ["HuggingFaceKind", "dinov2_ratio", "huggingface_config", "huggingface_kind"]


@dataclass(frozen=True)
class HuggingFaceKind:
    """One of transformers' classes.

    Attributes:
        model_type: in config.json. model_class: the class.
        layout: the family of its layout. limits: what its model may be.
        prefix: before the encoder's names; a class with a head has the encoder inside.
    """

    model_type: str
    model_class: str
    layout: str
    limits: str
    prefix: str


# Our family: model type, class with a head, class without one, layout.
_CLASSES = {
    "vit": ("vit", "ViTForImageClassification", "ViTModel", "vit"),
    "mae": ("vit_mae", "ViTForImageClassification", "ViTMAEModel", "vit"),
    "deit": ("deit", "DeiTForImageClassification", "DeiTModel", "vit"),
    "dinov2": ("dinov2", "Dinov2ForImageClassification", "Dinov2Model", "dinov2"),
    "dinov2_with_registers": (
        "dinov2_with_registers",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersModel",
        "dinov2",
    ),
    "clip": ("clip_vision_model", "CLIPVisionModelWithProjection", "CLIPVisionModel", "clip"),
}


def huggingface_kind(family: str, arguments: Mapping[str, Any]) -> HuggingFaceKind:
    """The class that comes nearest to a model with these arguments."""
    has_head = bool(arguments["num_classes"])
    if arguments["pre_norm"]:
        name = "clip"
    elif arguments["init_values"]:
        name = "dinov2_with_registers" if arguments["reg_tokens"] else "dinov2"
    elif arguments["reg_tokens"]:
        name = "deit"
    else:
        name = "mae" if family == "mae" and not has_head else "vit"
    model_type, with_head, without, layout = _CLASSES[name]
    prefix = f"{model_type}." if has_head and layout != "clip" else ""
    return HuggingFaceKind(model_type, with_head if has_head else without, layout, name, prefix)


def dinov2_ratio(arguments: Mapping[str, Any]) -> int:
    """The whole number `mlp_ratio` from which transformers gets the width of DINOv2's MLP.

    Raises:
        CheckpointError: there is none.
    """
    width = arguments["embed_dim"]
    hidden = int(width * arguments["mlp_ratio"])
    for ratio in range(1, 65):
        gated = (int(ratio * width * 2 / 3) + 7) // 8 * 8
        if hidden == (2 * gated if arguments["mlp_layer"] == "swiglu" else ratio * width):
            return ratio
    raise CheckpointError(f"mlp_ratio: transformers' Dinov2 can't have {hidden} features in the MLP at width {width}")


def huggingface_config(
    kind: HuggingFaceKind, arguments: Mapping[str, Any], source: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """config.json for transformers.

    Args:
        source: the config that the checkpoint came with; its other entries stay if it is of the same kind.
        dtype: of the weights, such as "float32".

    Raises:
        CheckpointError: an activation that transformers does not name.
    """
    own = vision_config(source)
    own_type = "clip_vision_model" if source.get("model_type") == "clip" else source.get("model_type")
    config: dict[str, Any] = {**own} if own_type == kind.model_type else {}
    for outdated in ("torch_dtype", "dtype", "no_embed_class", "transformers_version"):
        config.pop(outdated, None)
    config.update(
        architectures=[kind.model_class],
        model_type=kind.model_type,
        hidden_size=arguments["embed_dim"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        image_size=plain_size(arguments["img_size"]),
        patch_size=plain_size(arguments["patch_size"]),
        num_channels=arguments["in_chans"],
        layer_norm_eps=arguments["norm_eps"],
    )
    activation = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == arguments["act_layer"]), "")
    if not activation:
        raise CheckpointError(f"act_layer: {arguments['act_layer']!r} has no name in transformers")
    # another name of the same function stays
    if arguments["mlp_layer"] == "swiglu":
        config.setdefault("hidden_act", activation)
    elif ACTIVATIONS.get(config.get("hidden_act", "")) != arguments["act_layer"]:
        config["hidden_act"] = activation
    if kind.layout != "clip":
        config["qkv_bias"] = arguments["qkv_bias"]
    if kind.layout == "dinov2":
        config["mlp_ratio"] = dinov2_ratio(arguments)
        config["use_swiglu_ffn"] = arguments["mlp_layer"] == "swiglu"
        if arguments["reg_tokens"]:
            config["num_register_tokens"] = arguments["reg_tokens"]
    else:
        config["intermediate_size"] = int(arguments["embed_dim"] * arguments["mlp_ratio"])
    if kind.layout == "clip":
        if arguments["num_classes"]:
            config["projection_dim"] = arguments["num_classes"]
    elif arguments["num_classes"] and len(config.get("id2label") or {}) != arguments["num_classes"]:
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(arguments["num_classes"])}
        config["label2id"] = {f"LABEL_{index}": index for index in range(arguments["num_classes"])}
    return config
