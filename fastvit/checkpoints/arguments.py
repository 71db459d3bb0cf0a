"""From the shapes of a model's tensors to the arguments that build it.

The arguments are those of `fastvit.VisionTransformer`, in a form that JSON can hold: an activation, a norm and an MLP
are names, and `norm_eps` stands beside them. `model_arguments` makes the constructor's out of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.naming import State
from fastvit.model.layers import GluMlp, Mlp, norm_layer_of
from fastvit.model.patch_embed import pair
from fastvit.model.variants import list_models, variant_arguments

MLPS = {"mlp": Mlp, "swiglu": partial(GluMlp, act_layer=nn.SiLU, gate_last=False)}
HEAD_WIDTH = 64  # of nearly every ViT that has a name
NORM_EPS = 1e-6
# What tells named models of one width and depth apart.
_WEIGHTS = {
    "patch_size": 8, "reg_tokens": 8, "class_token": 8, "init_values": 4, "no_embed_class": 4, "num_heads": 4,
    "img_size": 2, "num_classes": 1,
}  # fmt: skip


def model_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `fastvit.VisionTransformer` for those that JSON can hold.

    `norm_eps` becomes a part of `norm_layer`, and the name "swiglu" of an MLP its class. Others stay as they are.

    Raises:
        ValueError: a name that is not known.
    """
    made = dict(arguments)
    eps = made.pop("norm_eps", None)
    norm = made.get("norm_layer") or "layernorm"
    if eps not in (None, NORM_EPS) and isinstance(norm, str):
        layer = norm_layer_of(norm)
        made["norm_layer"] = None if layer is None else partial(layer, eps=eps)
    if isinstance(mlp := made.get("mlp_layer"), str):
        if mlp not in MLPS:
            raise ValueError(f"mlp_layer: {mlp!r} is not known; accepted: a class, 'mlp' or 'swiglu'")
        made["mlp_layer"] = MLPS[mlp]
    return made


def arguments_of(
    state: State, known: Mapping[str, Any], conventions: Mapping[str, Any], sizes: Sequence[Any] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the model that these tensors belong to.

    Args:
        state: tensors in our names; `patch_embed.proj.weight` and at least one block must be there.
        known: arguments that the checkpoint's config, or the caller, gives.
        conventions: arguments that the checkpoint's library takes where nothing says otherwise.
        sizes: image sizes to try where the positions fill no square.

    Returns:
        The arguments, and a line for each that is not in the checkpoint and was assumed.

    Raises:
        CheckpointError: the positions fill no grid of patches.
    """
    found = {**_from_shapes(state), "pos_embed": "learn", **known}
    if found["depth"] > len(state):  # a number out of a name or a config must not build a giant
        raise CheckpointError(f"depth: {found['depth']} blocks in a checkpoint of {len(state)} tensors")
    assumed: list[str] = []

    def assume(name: str, value: Any, why: str = "") -> None:
        if name not in found:
            found[name] = value
            assumed.append(f"{name}={value!r}{why}")

    assume("img_size", None if "img_size" in found else _image_size(found, state, known.get("no_embed_class"), sizes))
    found |= {name: plain_size(name, found[name]) for name in ("img_size", "patch_size")}
    prefix = int(found["class_token"]) + found["reg_tokens"]
    if prefix and _rows(state) == math.prod(grid_of(found)):
        assume("no_embed_class", True, " (as many positions as patches)")
    found.setdefault("no_embed_class", False)
    for name, value in conventions.items():
        assume(name, value)
    behind = "fc_norm.weight" in state
    found.setdefault("final_norm", behind or "norm.weight" in state)
    found.setdefault("fc_norm", behind)
    assume("global_pool", "token" if found["class_token"] and not behind else "avg")
    if "num_heads" not in found:
        number, why = _heads(found, state)
        found["num_heads"] = number
        assumed += [f"num_heads={number} ({why})"] if why else []
    return found, assumed


def _from_shapes(state: State) -> dict[str, Any]:
    weight = state["patch_embed.proj.weight"]  # [D, C, P_h, P_w]
    if weight.dim() != 4:
        raise CheckpointError(f"patch_embed.proj.weight: expected 4 dimensions, got shape {list(weight.shape)}")
    width, channels, *patch = weight.shape
    first = {re.sub(r"^blocks\.\d+\.", "", name): tensor for name, tensor in reversed(state.items())}
    fc1, fc2 = first.get("mlp.fc1.weight"), first.get("mlp.fc2.weight")
    hidden = fc1.shape[0] if fc1 is not None and fc1.dim() == 2 else 4 * width
    has_gate = fc2 is not None and fc2.dim() == 2 and 2 * fc2.shape[1] == hidden
    head = state.get("head.weight")
    return {
        "patch_size": patch,
        "in_chans": channels,
        "num_classes": 0 if head is None else head.shape[0] if head.dim() == 2 else 1,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "mlp_ratio": mlp_ratio_of(hidden, width),
        **({"mlp_layer": "swiglu", "act_layer": "silu"} if has_gate else {"mlp_layer": "mlp"}),
        "qkv_bias": "attn.qkv.bias" in first,
        "proj_bias": any(f"{layer}.bias" in first for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")),
        "qk_norm": "attn.q_norm.weight" in first or "attn.k_norm.weight" in first,
        "scale_attn_norm": "attn.norm.weight" in first,
        "scale_mlp_norm": "mlp.norm.weight" in first,
        "init_values": 1e-5 if "ls1.gamma" in first or "ls2.gamma" in first else None,
        "class_token": "cls_token" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state and state["reg_token"].dim() == 3 else 0,
        "pre_norm": "norm_pre.weight" in state,
        "embed_norm_layer": "layernorm" if "patch_embed.norm.weight" in state else None,
        "norm_layer": "layernorm" if "norm1.bias" in first or "norm2.bias" in first else "rmsnorm",
    }


def mlp_ratio_of(hidden: int, width: int) -> float:
    """The ratio whose product with the width, cut to a whole number, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def plain_size(name: str, size: Any) -> int | list[int]:
    """One number for a square, else [height, width]."""
    height, width = pair(name, size)
    return height if height == width else [height, width]


def _rows(state: State) -> int:
    """How many positions there are."""
    table = state.get("pos_embed")
    return table.shape[1] if table is not None and table.dim() == 3 else 0


def _image_size(found: Mapping[str, Any], state: State, told: bool | None, sizes: Sequence[Any]) -> int | list[int]:
    """The image size that the positions fill: a square, or one of `sizes` that fits.

    Args:
        told: whether the class token and registers are said to have none, so that a square is never doubted.
    """
    rows, patch = _rows(state), pair("patch_size", found["patch_size"])
    if not rows:
        return sizes[0] if sizes else 224
    prefix = int(found["class_token"]) + found["reg_tokens"]
    # with registers, as in timm, none has a position, or the class token alone as in DINOv2's own files
    positioned = [0, prefix, 1] if found["reg_tokens"] and found["class_token"] else [prefix, 0]
    positioned = [extra for extra in positioned if told is None or (extra != prefix) == told]
    sides = {extra: math.isqrt(max(rows - extra, 0)) for extra in positioned}
    squares = {extra: side for extra, side in sides.items() if side and side * side == rows - extra}
    fitting = {
        extra: plain_size("img_size", size)
        for size in reversed(sizes)
        for extra in reversed(positioned)
        if rows - extra == math.prod(grid_of({"img_size": size, "patch_size": patch}))
    }
    if told is None and squares and fitting and not squares.keys() & fitting.keys():
        raise CheckpointError(
            f"pos_embed: {rows} rows may be a square of patches or those of {list(fitting.values())[0]}; "
            "say which, with no_embed_class=True or False"
        )
    for side in squares.values():
        return plain_size("img_size", (side * patch[0], side * patch[1]))
    for size in fitting.values():
        return size
    raise CheckpointError(
        f"pos_embed: {rows} rows, {max(positioned)} of them of class and register tokens, leave no square of patches; "
        "give the checkpoint's own img_size=(height, width)"
    )


def fold_class_position(state: State, found: Mapping[str, Any]) -> tuple[State, State]:
    """A table with a position for the class token alone, where registers or the arguments want none.

    As in timm's models, the class token then holds its position, and the table has patches only.

    Returns:
        The state, and the parts that the way back needs; empty where there was nothing to add up.
    """
    table = state.get("pos_embed")
    if table is None or table.dim() != 3 or table.shape[1] != 1 + math.prod(grid_of(found)):
        return state, {}
    if not found["class_token"] or not (found["reg_tokens"] or found["no_embed_class"]):
        return state, {}
    own, position = state.get("cls_token"), table[:, :1]
    if own is None or own.shape != position.shape:
        return state, {}
    folded = {**state, "pos_embed": table[:, 1:]}
    if not position.count_nonzero():
        return folded, {}
    return {**folded, "cls_token": own + position}, {"cls_token": own, "cls_position": position}


def grid_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = pair("img_size", arguments["img_size"])
    patch = pair("patch_size", arguments["patch_size"])
    return height // patch[0], width // patch[1]


def _heads(found: Mapping[str, Any], state: State) -> tuple[int, str]:
    """The number of heads, and why where the tensors do not say it."""
    width = found["embed_dim"]
    of_query = next((tensor for name, tensor in state.items() if name.endswith("attn.q_norm.weight")), None)
    if of_query is not None and of_query.dim() == 1 and len(of_query) and width % len(of_query) == 0:
        return width // len(of_query), ""
    if variant := nearest_variant(found):
        return variant_arguments(variant)["num_heads"], f"as {variant}"
    heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
    return heads, f"{width // heads} a head"


def nearest_variant(arguments: Mapping[str, Any], family: str = "") -> str:
    """The named model of this width and depth that has most else in common; "" if there is none."""
    start = {"deit": "deit_", "deit3": "deit3_"}.get(family, "")

    def likeness(name: str) -> tuple[int, int]:
        theirs = {"num_classes": 1000, "class_token": True, **variant_arguments(name)}
        alike = sum(
            weight
            for key, weight in _WEIGHTS.items()
            if (arguments.get(key) or 0) == (theirs.get(key) or 0)
            or (key == "init_values" and bool(arguments.get(key)) == bool(theirs.get(key)))
        )
        # of equals the shortest name, which is the plainest model's
        return alike + (16 if start and name.startswith(start) else 0), -len(name)

    sizes = (arguments["embed_dim"], arguments["depth"])
    fitting = [
        name for name in list_models() if tuple(variant_arguments(name)[k] for k in ("embed_dim", "depth")) == sizes
    ]
    return max(fitting, key=likeness, default="")
