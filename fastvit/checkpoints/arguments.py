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
from fastvit.model.layers import GluMlp, norm_layer_of
from fastvit.model.patch_embed import pair
from fastvit.model.variants import list_models, variant_arguments

__all__ = [
    "arguments_of",
    "fold_class_position",
    "grid_of",
    "mlp_ratio_of",
    "model_arguments",
    "nearest_variant",
    "plain_size",
]

SWIGLU = partial(GluMlp, act_layer=nn.SiLU, gate_last=False)
HEAD_WIDTH = 64  # of nearly every ViT that has a name
NORM_EPS = 1e-6


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
    mlp = made.get("mlp_layer")
    if isinstance(mlp, str):
        if mlp not in ("mlp", "swiglu"):
            raise ValueError(f"mlp_layer: {mlp!r} is not known; accepted: a class, 'mlp' or 'swiglu'")
        del made["mlp_layer"]
        if mlp == "swiglu":
            made["mlp_layer"] = SWIGLU
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
    found = _from_shapes(state)
    assumed: list[str] = []
    found.update({name: value for name, value in known.items() if name not in ("img_size", "no_embed_class")})
    if found["depth"] > len(state):  # a number out of a name or a config must not build a giant
        raise CheckpointError(f"depth: {found['depth']} blocks in a checkpoint of {len(state)} tensors")
    _add_positions(found, state, known, sizes, assumed)
    for name, value in conventions.items():
        if name not in found:
            found[name] = value
            assumed.append(f"{name}={value!r}")
    _add_pool(found, state, assumed)
    _add_heads(found, state, assumed)
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
        "patch_size": plain_size(patch),
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


def plain_size(size: int | Sequence[int]) -> int | list[int]:
    """One number for a square, else [height, width]."""
    height, width = pair("size", list(size) if isinstance(size, Sequence) else size)
    return height if height == width else [height, width]


# ---- positions ---------------------------------------------------------------------------------------------------


def _add_positions(
    found: dict[str, Any], state: State, known: Mapping[str, Any], sizes: Sequence[Any], assumed: list[str]
) -> None:
    """Adds `img_size`, `pos_embed` and `no_embed_class`."""
    found.setdefault("pos_embed", "learn")
    table = state.get("pos_embed")
    table = table if table is not None and table.dim() == 3 else None
    prefix = int(found["class_token"]) + found["reg_tokens"]
    size = known.get("img_size")
    if size is None and table is not None:
        # with registers, as in timm, none has a position, or the class token alone as in DINOv2's own files
        positioned = [0, prefix, 1] if found["reg_tokens"] and found["class_token"] else [prefix, 0]
        told = known.get("no_embed_class")
        if told is not None:
            positioned = [extra for extra in positioned if (extra != prefix) == told]
        size = _size_of_table(table.shape[1], positioned, found["patch_size"], sizes, sure=told is not None)
    elif size is None:
        size = sizes[0] if sizes else 224
    if "img_size" not in known:
        assumed.append(f"img_size={size!r}")
    found["img_size"] = plain_size(pair("img_size", size))
    if "no_embed_class" in known:
        found["no_embed_class"] = known["no_embed_class"]
    else:
        found["no_embed_class"] = table is not None and prefix > 0 and table.shape[1] == math.prod(grid_of(found))
        if found["no_embed_class"]:
            assumed.append("no_embed_class=True (as many positions as patches)")


def _size_of_table(
    rows: int, positioned: Sequence[int], patch_size: Any, sizes: Sequence[Any], sure: bool
) -> int | list[int]:
    """The image size of a table of positions: a square, or one of `sizes` that fits.

    Args:
        positioned: how many of the rows may belong to class and register tokens, the likeliest first.
        sure: that was said, so that a square is never doubted.
    """
    patch = pair("patch_size", patch_size)
    sides = {extra: math.isqrt(max(rows - extra, 0)) for extra in positioned}
    squares = {extra: side for extra, side in sides.items() if side and side * side == rows - extra}
    fitting = {
        extra: plain_size(size)
        for size in reversed(sizes)
        for extra in reversed(positioned)
        if rows - extra == math.prod(grid_of({"img_size": size, "patch_size": patch}))
    }
    if not sure and squares and fitting and not squares.keys() & fitting.keys():
        raise CheckpointError(
            f"pos_embed: {rows} rows may be a square of patches or those of {list(fitting.values())[0]}; "
            "say which, with no_embed_class=True or False"
        )
    for side in squares.values():
        return plain_size((side * patch[0], side * patch[1]))
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


# ---- pooling and heads -------------------------------------------------------------------------------------------


def _add_pool(found: dict[str, Any], state: State, assumed: list[str]) -> None:
    """Adds `global_pool`, `final_norm` and `fc_norm`."""
    behind = "fc_norm.weight" in state
    found.setdefault("final_norm", behind or "norm.weight" in state)
    found.setdefault("fc_norm", behind)
    if "global_pool" not in found:
        found["global_pool"] = "token" if found["class_token"] and not behind else "avg"
        assumed.append(f"global_pool={found['global_pool']!r}")


def _add_heads(found: dict[str, Any], state: State, assumed: list[str]) -> None:
    width = found["embed_dim"]
    if "num_heads" in found:
        return
    of_query = next((tensor for name, tensor in state.items() if name.endswith("attn.q_norm.weight")), None)
    if of_query is not None and of_query.dim() == 1 and len(of_query) and width % len(of_query) == 0:
        found["num_heads"] = width // len(of_query)
        return
    variant = nearest_variant(found)
    if variant:
        found["num_heads"] = variant_arguments(variant)["num_heads"]
        assumed.append(f"num_heads={found['num_heads']} (as {variant})")
        return
    heads = max(1, width // HEAD_WIDTH)
    while width % heads:
        heads -= 1
    found["num_heads"] = heads
    assumed.append(f"num_heads={heads} ({width // heads} a head)")


def nearest_variant(arguments: Mapping[str, Any], start: str = "") -> str:
    """The named model of this width and depth that has most else in common; "" if there is none.

    Args:
        start: prefer names that start so.
    """
    best, best_score = "", 0
    for name in list_models():
        variant = {"num_classes": 1000, "class_token": True, **variant_arguments(name)}
        if (variant["embed_dim"], variant["depth"]) != (arguments["embed_dim"], arguments["depth"]):
            continue
        weights = {
            "patch_size": 8, "reg_tokens": 8, "class_token": 8, "init_values": 4, "no_embed_class": 4,
            "num_heads": 4, "img_size": 2, "num_classes": 1,
        }  # fmt: skip
        score = 1 + (16 if start and name.startswith(start) else 0)
        for key, weight in weights.items():
            ours, theirs = arguments.get(key), variant.get(key)
            same = bool(ours) == bool(theirs) if key == "init_values" else (ours or 0) == (theirs or 0)
            score += weight if same else 0
        # of equals the shortest name, which is the plainest model's
        if score > best_score or (score == best_score and len(name) < len(best)):
            best, best_score = name, score
    return best
