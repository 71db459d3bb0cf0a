"""config.json of transformers' and timm's models: what it says in our arguments, and the one that goes with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvit.checkpoints.arguments import NORM_EPS, nearest_variant
from fastvit.checkpoints.errors import CheckpointError
from fastvit.model.arguments import POOLS
from fastvit.model.variants import list_models, variant_arguments

# ---- transformers ----------------------------------------------------------------------------------------------------

# transformers' names of activations; of several for ours the first is written.
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# Our arguments and its names for them.
_NAMES = {
    "embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps", "in_chans": "num_channels", "img_size": "image_size", "patch_size": "patch_size",
}  # fmt: skip
Limits = Mapping[str, tuple[Any, ...]]

# What a library's plain model may be, argument by argument; what is not named may be anything.
PLAIN: Limits = {
    "class_token": (True,), "reg_tokens": (0,), "init_values": (None,), "pre_norm": (False,), "final_norm": (True,),
    "fc_norm": (False,), "qk_norm": (False,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,),
    "embed_norm_layer": (None,), "norm_layer": ("layernorm",), "mlp_layer": ("mlp",), "proj_bias": (True,),
    "pos_embed": ("learn",),
}  # fmt: skip
_DINOV2 = {name: allowed for name, allowed in PLAIN.items() if name not in ("init_values", "mlp_layer")}
_REGISTERS = {**_DINOV2, "no_embed_class": (True,)}
del _REGISTERS["reg_tokens"]
_CLIP = {**PLAIN, "pre_norm": (True,), "qkv_bias": (True,)}


@dataclass(frozen=True)
class HuggingFaceClass:
    """A model type of transformers, with its classes.

    Attributes:
        model_type: in config.json.
        family: what it is to us. layout: the family of its layout.
        start: what the names of its classes begin with.
        limits: what its model may be.
    """

    model_type: str
    family: str
    layout: str
    start: str
    limits: Limits

    def name_for(self, arguments: Mapping[str, Any]) -> str:
        """The class, with or without a head."""
        if self.layout == "clip":
            return f"{self.start}WithProjection" if arguments["num_classes"] else self.start
        return f"{self.start}{'ForImageClassification' if arguments['num_classes'] else 'Model'}"

    def prefix_for(self, arguments: Mapping[str, Any]) -> str:
        """What stands before the encoder's names; a class with a head has the encoder inside."""
        return f"{self.model_type}." if arguments["num_classes"] else ""


_CLASSES = {
    made.model_type: made
    for made in (
        HuggingFaceClass("vit", "vit", "vit", "ViT", PLAIN),
        HuggingFaceClass("vit_mae", "mae", "vit", "ViTMAE", PLAIN),
        HuggingFaceClass("deit", "deit", "vit", "DeiT", {**PLAIN, "reg_tokens": (1,), "no_embed_class": (False,)}),
        HuggingFaceClass("dinov2", "dinov2", "dinov2", "Dinov2", _DINOV2),
        HuggingFaceClass("dinov2_with_registers", "dinov2", "dinov2", "Dinov2WithRegisters", _REGISTERS),
        HuggingFaceClass("clip_vision_model", "clip", "clip", "CLIPVisionModel", _CLIP),
    )
}
_FAMILIES = {**{made.model_type: made.family for made in _CLASSES.values()}, "clip": "clip"}


def huggingface_class(family: str, arguments: Mapping[str, Any]) -> HuggingFaceClass:
    """The class that comes nearest to a model with these arguments."""
    if arguments["pre_norm"]:
        return _CLASSES["clip_vision_model"]
    if arguments["init_values"]:
        return _CLASSES["dinov2_with_registers" if arguments["reg_tokens"] else "dinov2"]
    if arguments["reg_tokens"]:
        return _CLASSES["deit"]
    return _CLASSES["vit_mae" if family == "mae" and not arguments["num_classes"] else "vit"]


def family_of(config: Mapping[str, Any]) -> str:
    """The family that a config names, "" if it names none.

    Raises:
        CheckpointError: a model of transformers that FastViT can't read.
    """
    kind = config.get("model_type")
    if kind is None:
        return str(config.get("family", ""))
    if kind not in _FAMILIES:
        raise CheckpointError(f"model_type: {kind!r} is no model that FastViT reads; it reads {', '.join(_FAMILIES)}")
    return _FAMILIES[kind]


def _of_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that is about the image encoder."""
    inside = config.get("vision_config")
    return dict(inside if isinstance(inside, Mapping) else config)


def _from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {**_NAMES, "no_embed_class": "no_embed_class"}
    known = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    activation = config.get("hidden_act")
    if activation is not None and not config.get("use_swiglu_ffn"):
        if activation not in _ACTIVATIONS:
            accepted = ", ".join(_ACTIVATIONS)
            raise CheckpointError(f"hidden_act: {activation!r} is no activation of FastViT's; accepted: {accepted}")
        known["act_layer"] = _ACTIVATIONS[activation]
    return known


def huggingface_config(
    kind: HuggingFaceClass, arguments: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json for transformers.

    Args:
        source: the config that the checkpoint came with; its other entries stay if it is of the same kind.

    Raises:
        CheckpointError: an activation that transformers does not name, or an MLP that its DINOv2 can't have.
    """
    own_type = "clip_vision_model" if source.get("model_type") == "clip" else source.get("model_type")
    config = _of_images(source) if own_type == kind.model_type else {}
    for outdated in ("torch_dtype", "dtype", "no_embed_class", "transformers_version"):
        config.pop(outdated, None)
    config.update(architectures=[kind.name_for(arguments)], model_type=kind.model_type)
    config.update({theirs: arguments[ours] for ours, theirs in _NAMES.items()})
    activation = next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == arguments["act_layer"]), "")
    if not activation:
        raise CheckpointError(f"act_layer: {arguments['act_layer']!r} has no name in transformers")
    # another name of the same function stays
    if arguments["mlp_layer"] == "swiglu":
        config.setdefault("hidden_act", activation)
    elif _ACTIVATIONS.get(config.get("hidden_act", "")) != arguments["act_layer"]:
        config["hidden_act"] = activation
    classes = arguments["num_classes"]
    if kind.layout != "clip":
        config["qkv_bias"] = arguments["qkv_bias"]
        if classes and len(config.get("id2label") or {}) != classes:
            config["id2label"] = {str(index): f"LABEL_{index}" for index in range(classes)}
            config["label2id"] = {f"LABEL_{index}": index for index in range(classes)}
    elif classes:
        config["projection_dim"] = classes
    if kind.layout != "dinov2":
        config["intermediate_size"] = int(arguments["embed_dim"] * arguments["mlp_ratio"])
        return config
    config["mlp_ratio"] = _dinov2_ratio(arguments)
    config["use_swiglu_ffn"] = arguments["mlp_layer"] == "swiglu"
    return {**config, "num_register_tokens": arguments["reg_tokens"]} if arguments["reg_tokens"] else config


def _dinov2_ratio(arguments: Mapping[str, Any]) -> int:
    """The whole number `mlp_ratio` from which transformers gets the width of DINOv2's MLP."""
    width = arguments["embed_dim"]
    hidden = int(width * arguments["mlp_ratio"])
    for ratio in range(1, 65):
        gated = (int(ratio * width * 2 / 3) + 7) // 8 * 8
        if hidden == (2 * gated if arguments["mlp_layer"] == "swiglu" else ratio * width):
            return ratio
    raise CheckpointError(f"mlp_ratio: transformers' Dinov2 can't have {hidden} features in the MLP at width {width}")


# ---- timm ------------------------------------------------------------------------------------------------------------

# Arguments that `model_args` of its configs may have, and that are ours too.
_TIMM_ARGUMENTS = (
    "img_size", "num_heads", "class_token", "no_embed_class", "global_pool", "fc_norm", "act_layer",
    "pool_include_prefix", "init_values",
)  # fmt: skip


def _from_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(config["architecture"]).partition(".")[0]
    arguments = config.get("model_args") or {}
    known: dict[str, Any] = {}
    if name in list_models():  # of these FastViT knows every argument, the norm's eps and the activation too
        variant = {"global_pool": "token", "act_layer": "gelu", **variant_arguments(name)}
        known = {"norm_eps": NORM_EPS, **{key: variant[key] for key in ("num_heads", "global_pool")}}
        known.update({"fc_norm": variant["fc_norm"]} if "fc_norm" in variant else {})
        known.update({"act_layer": "gelu"} if variant["act_layer"] == "gelu" else {})  # else the MLP's kind settles it
    known.update({"no_embed_class": True} if is_flexi(config) else {})
    known.update({"act_layer": "quick_gelu"} if "quickgelu" in name else {})
    known.update({key: config[key] for key in ("global_pool", "norm_eps") if config.get(key) is not None})
    known.update({key: arguments[key] for key in _TIMM_ARGUMENTS if arguments.get(key) is not None})
    # Attention pooling is refused by its tensors' names.
    if known.get("global_pool") == "map" or known.get("global_pool") not in POOLS:
        known.pop("global_pool", None)
    return known


def timm_config(family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for timm, which takes `model_args` beside the nearest named model's."""
    size = arguments["img_size"]
    theirs = {key: value for key, value in arguments.items() if key not in ("norm_eps", "num_classes", "mlp_layer")}
    if theirs.get("norm_layer") == "layernorm":
        del theirs["norm_layer"]
    return {
        "architecture": nearest_variant(arguments, family) or "vit_base_patch16_224",
        "num_classes": arguments["num_classes"],
        "num_features": arguments["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": {key: value for key, value in theirs.items() if value is not None},
        "norm_eps": arguments["norm_eps"],
        "pretrained_cfg": {
            "num_classes": arguments["num_classes"],
            "input_size": [arguments["in_chans"], *([size, size] if isinstance(size, int) else size)],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def is_flexi(config: Mapping[str, Any] | None) -> bool:
    """Whether timm's config names a FlexiViT, which was trained with bilinear resizing of patches and positions."""
    return "flexi" in str((config or {}).get("architecture", ""))


def sizes_from(config: Mapping[str, Any]) -> list[Any]:
    """Image sizes that timm's config names, though the weights may have another."""
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    return [list(size[1:])] if isinstance(size, (list, tuple)) and len(size) == 3 else []


def known_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a config gives: FastViT's own, transformers' or timm's.

    Raises:
        CheckpointError: an activation that FastViT does not have.
    """
    if isinstance(config.get("fastvit"), Mapping):
        return dict(config["fastvit"])
    if "model_type" in config:
        return _from_transformers(_of_images(config))
    return _from_timm(config) if "architecture" in config else {}
