"""Hugging Face transformers: the blocks of its vision models."""

from __future__ import annotations

import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Sequence
from functools import lru_cache
from textwrap import dedent
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit import branches, trunk
from fastvit.guards import attribute, full_name
from fastvit.half_block import Products
from fastvit.interop.trunk import TrunkBlock
from fastvit.stream import Normed, Result, Setup

__all__ = ["TRUNK", "fingerprint"]


class Attention(NamedTuple):
    """What attention calls its parts."""

    output: str
    scale: str
    dropout: str


# Of `forward`, by the fingerprint of its source: three projections of the same tokens, the library's interface to
# attention, and a projection. What is written otherwise in another version runs as it is.
_ATTENTIONS = {
    # ViT, DeiT, MAE, MSN, I-JEPA, BEiT and DINOv2
    "adc5cc326f38c83d": Attention("o_proj", "scaling", "attention_dropout"),
    "fc74055093a5a4ca": Attention("out_proj", "scale", "dropout"),  # CLIP
    "cf1146fbd3ddb554": Attention("out_proj", "scale", "dropout"),  # SigLIP and SigLIP 2
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_SDPA = "transformers.integrations.sdpa_attention.sdpa_attention_forward"


@lru_cache
def fingerprint(function: Callable[..., Any]) -> str:
    """Of the tokens of a function's source without comments and docstring, "" where there is no source."""
    try:
        source = dedent(inspect.getsource(inspect.unwrap(function)))
        tokens = [*tokenize.generate_tokens(io.StringIO(source).readline)]
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return ""
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    words = [
        token.string
        for before, token in zip([None, *tokens], tokens, strict=False)
        if token.type not in layout
        and not (token.type == tokenize.STRING and before is not None and before.type in layout)
    ]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def _plan_attention(module: Any, setup: Setup, **options: Any) -> branches.Run:
    """Three projections as one product of packed weights, attention, and the projection of its result."""
    as_it_is = branches.whole_branch(module, setup, **options)
    if torch.compiler.is_compiling() or any(value is not None for value in options.values()):
        return as_it_is  # by the compiler, or with a mask
    names = _ATTENTIONS[fingerprint(type(module).forward)]
    layers = [attribute(module, name) for name in _PROJECTIONS]
    weights, biases = ([attribute(layer, name) for layer in layers] for name in ("weight", "bias"))
    first, *rest = weights
    below, bias = (*rest,), _packing(biases, first)
    head_dim, scale = attribute(module, "head_dim"), attribute(module, names.scale)
    heads = first.shape[0] // head_dim
    others: dict[str, Any] = {} if scale == head_dim**-0.5 else {"scale": scale}
    dropout = attribute(module, names.dropout) if module.training else 0.0
    attend = branches.attention_of(setup, dropout=dropout, **others)
    project, is_sdpa = branches.product(attribute(module, names.output), setup), _asks_for_sdpa(module)

    def run(x: Normed) -> Result:
        if not _pays(x.stream.residual, first, setup) or not is_sdpa():
            return as_it_is(x)
        return project(attend(x, Products(first, bias(), "", heads, None, None, below)))

    return run


def _packing(biases: Sequence[Tensor | None], weight: Tensor) -> Callable[[], Tensor | None]:
    """Biases [F] of layers with such a weight one behind the other, zeros for those that are missing."""
    if all(bias is None for bias in biases):
        return lambda: None
    return lambda: torch.cat([weight.new_zeros(weight.shape[0]) if bias is None else bias for bias in biases])


def _pays(tokens: Tensor, weight: Tensor, setup: Setup) -> bool:
    """Whether the copies pay by which three weights become one.

    Under autocast a copy of each is made anyway. On a CPU a copy of all of them, 3·D² values, moves less than the two
    sums of gradients, 2·N·D values, which one product in place of three saves, if there are as many tokens as features.
    """
    autocast, (batch, rows, width) = setup.state.autocast, tokens.shape
    if autocast is not None:
        return weight.dtype not in (autocast, torch.float64)
    return tokens.device.type == "cpu" and weight.dtype == tokens.dtype and batch * rows >= width


def _asks_for_sdpa(module: Any) -> Callable[[], bool]:
    """Whether attention is torch's scaled_dot_product_attention, which a setting or a registration can change."""
    scope, config = inspect.unwrap(type(module).forward).__globals__, attribute(module, "config")

    def is_sdpa() -> bool:
        try:
            function = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(config._attn_implementation, None)
            return full_name(function) == _SDPA
        except (AttributeError, KeyError):
            return False

    return is_sdpa


def _why_no_attention(module: Any) -> str:
    """Why attention runs as it is, with tokens of the norm's own dtype; "" where it is ours, or the norm's may be."""
    names = _ATTENTIONS[fingerprint(type(module).forward)]
    missing = [name for name in (*_PROJECTIONS, names.output) if not isinstance(attribute(module, name), nn.Linear)]
    if missing:
        return f"has no linear layer {missing[0]}"
    if reason := branches.why_watched(module):
        return reason
    if not _asks_for_sdpa(module)():
        return "does not use scaled_dot_product_attention"
    layers = [attribute(module, name) for name in _PROJECTIONS]
    if reason := next((reason for reason in map(branches.why_not_linear, layers) if reason), ""):
        return f"has a projection that {reason}"
    forms = {(weight.shape, weight.dtype) for weight in (attribute(layer, "weight") for layer in layers)}
    if len(forms) > 1 or getattr(module, "num_key_value_groups", 1) != 1:
        return "has projections of several shapes"
    if layers[0].weight.dim() != 2 or layers[0].weight.shape[0] % attribute(module, "head_dim"):
        return "has heads that are no whole part of its projections"
    return "is causal" if attribute(module, "is_causal") else ""


_ATTENTION = branches.Branch(_plan_attention, _why_no_attention)


class Layer(TrunkBlock):
    """Blocks of all models here."""

    @classmethod
    def learn(cls, module: Any) -> None:
        for name, known in ((half.branch, _BRANCHES) for half in cls.form):
            part = attribute(module, name)
            family = full_name(type(part)).rpartition(".")[0]
            if family in {host.rpartition(".")[0] for host in cls.hosts}:
                kind = next((kind for kind in known if type(part).__name__.endswith(kind)), "")
                if kind:
                    is_ours = kind == "Attention" and fingerprint(type(part).forward) in _ATTENTIONS
                    branches.know(branches={type(part).forward: _ATTENTION if is_ours else known[kind]})
            for act in part._modules.values():
                known_act = _ACTS.get(type(act).__name__)
                if known_act and type(act).__module__ == "transformers.activations":
                    branches.know(acts={type(act).forward: known_act})
        for half in cls.form:
            scale, drop_path = (attribute(module, name) if name else None for name in (half.scale, half.drop_path))
            if isinstance(scale, nn.Module) and type(scale).__name__.endswith("LayerScale"):
                branches.know(scales={type(scale).forward: "lambda1"})
            if isinstance(drop_path, nn.Module) and type(drop_path).__name__.endswith("DropPath"):
                branches.know(drop_paths=[type(drop_path).forward])


_GATED = branches.mlp("gate_proj", "act_fn", last="down_proj", up="up_proj")
_BRANCHES = {
    "GatedMLP": _GATED,
    "SwiGLUFFN": _GATED,
    "Attention": branches.WHOLE,
    "DINOv3ViTMLP": branches.mlp("up_proj", "act_fn", last="down_proj"),
    "MLP": branches.mlp("fc1", "activation_fn", last="fc2"),
}
# The library's own activations, by the names of their classes.
_ACTS: dict[str, Callable[[Any], str]] = {
    "GELUActivation": lambda act: "gelu" if act.act is nn.functional.gelu else "",
    "QuickGELUActivation": lambda _: "quick_gelu",
    "GELUTanh": lambda act: "" if inspect.ismethod(act.act) else "gelu_tanh",
    "PytorchGELUTanh": lambda _: "gelu_tanh",  # in older versions
}


def _classes(layer: str, *models: str) -> tuple[str, ...]:
    """Full names of the block of models, each "model Prefix"."""
    found = (model.split() for model in models)
    return tuple(f"transformers.models.{name}.modeling_{name}.{prefix}{layer}" for name, prefix in found)


class ViTLayer(Layer):
    """ViT, DeiT, MAE, MSN and I-JEPA."""

    hosts = _classes("Layer", "vit ViT", "deit DeiT", "vit_mae ViTMAE", "vit_msn ViTMSN", "ijepa IJepa")
    form = (
        trunk.Names("layernorm_before", "attention", "dropout"),
        trunk.Names("layernorm_after", "mlp", "dropout"),
    )


class BeitLayer(Layer):
    """BEiT, without relative positions of each layer's own, which its forward makes."""

    hosts = _classes("Layer", "beit Beit")
    form = (
        trunk.Names("layernorm_before", "attention", "dropout", "lambda_1", "drop_path"),
        trunk.Names("layernorm_after", "mlp", "dropout", "lambda_2", "drop_path"),
    )

    @classmethod
    def refusal(cls, module: Any) -> str:
        own = attribute(module, "relative_position_bias")
        return super().refusal(module) or ("" if own is None else "it makes relative positions of its own")

    def options(self, attention_mask: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        left_out = ("interpolate_pos_encoding", "resolution")  # for its own relative positions
        rest = {name: value for name, value in kwargs.items() if name not in left_out}
        return {"attention_mask": attention_mask, **rest}


class Dinov2Layer(Layer):
    """DINOv2, with registers or without, and DINOv3."""

    hosts = _classes("Layer", "dinov2 Dinov2", "dinov2_with_registers Dinov2WithRegisters", "dinov3_vit DINOv3ViT")
    form = (
        trunk.Names("norm1", "attention", "", "layer_scale1", "drop_path"),
        trunk.Names("norm2", "mlp", "", "layer_scale2", "drop_path"),
    )


class EncoderLayer(Layer):
    """The towers of CLIP and SigLIP."""

    hosts = _classes("EncoderLayer", "clip CLIP", "siglip Siglip", "siglip2 Siglip2")
    form = trunk.Names("layer_norm1", "self_attn"), trunk.Names("layer_norm2", "mlp")


TRUNK: tuple[type[TrunkBlock], ...] = (ViTLayer, BeitLayer, Dinov2Layer, EncoderLayer)
