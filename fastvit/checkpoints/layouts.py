"""The tables: what timm, torchvision, transformers and Google's JAX code call the tensors of a Vision Transformer.

Our names are timm's. A table gives the library's name for each of them; `Table` in naming.py says how to read one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastvit.checkpoints.naming import BESIDE, UNUSED, Layout, Refusal, Stored, Table, reshaped

MANY_LAYERS = "FastViT's head is one linear layer, this one several"
NO_POOLING = "FastViT has no attention pooling"
NO_REPRESENTATION = "FastViT has no layer between pooling and head"
NO_SECOND_HEAD = "FastViT has one head, not a second one on the distillation token"
TWO_PARTS = "FastViT's head reads one pooled token, this one class token and mean together"
# Parts without which the head behind them means nothing.
TAKE_HEAD = (NO_POOLING, NO_REPRESENTATION, TWO_PARTS)


def _table(outside: Table, block: str, inside: Table) -> Table:
    """A table whose names of blocks begin alike."""
    return {**outside, **{f"blocks.#.{ours}": f"{block}.{theirs}" for ours, theirs in inside.items()}}


# ---- timm ------------------------------------------------------------------------------------------------------------

_TIMM_NAMES = (
    "cls_token", "reg_token", "pos_embed", "patch_embed.proj.*", "patch_embed.norm.*", "norm_pre.*",
    "blocks.#.norm1.*", "blocks.#.attn.qkv.*", "blocks.#.attn.q_norm.*", "blocks.#.attn.k_norm.*",
    "blocks.#.attn.norm.*", "blocks.#.attn.proj.*", "blocks.#.ls1.gamma", "blocks.#.norm2.*", "blocks.#.mlp.fc1.*",
    "blocks.#.mlp.norm.*", "blocks.#.mlp.fc2.*", "blocks.#.ls2.gamma", "norm.*", "fc_norm.*", "head.*",
)  # fmt: skip

TIMM = Layout(
    schema="timm",
    family="vit",
    table={name: name for name in _TIMM_NAMES},
    older={  # DeiT's second token, DINOv2's and DeiT III's own files
        "dist_token": "reg_token",
        "register_tokens": "reg_token",
        "blocks.#.mlp.w12.*": "blocks.#.mlp.fc1.*",
        "blocks.#.mlp.w3.*": "blocks.#.mlp.fc2.*",
        "blocks.#.gamma_1": "blocks.#.ls1.gamma",
        "blocks.#.gamma_2": "blocks.#.ls2.gamma",
    },
    others={
        "mask_token": UNUSED,
        "decoder_**": BESIDE,
        "head_dist.*": NO_SECOND_HEAD,
        "pre_logits.**": NO_REPRESENTATION,
        "attn_pool.**": NO_POOLING,
        **dict.fromkeys(("head.#.**", "head.mlp.**", "head.last_layer.**"), MANY_LAYERS),
    },
    assumed={"norm_eps": 1e-6, "act_layer": "gelu"},
)

# ---- torchvision -----------------------------------------------------------------------------------------------------

TORCHVISION = Layout(
    schema="torchvision",
    family="vit",
    table=_table(
        {
            "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj.*": "conv_proj.*",
            "norm.*": "encoder.ln.*", "head.*": "heads.head.*",
        },
        "encoder.layers.encoder_layer_#",
        {
            "norm1.*": "ln_1.*", "norm2.*": "ln_2.*", "mlp.fc1.*": "mlp.0.*", "mlp.fc2.*": "mlp.3.*",
            "attn.qkv.*": "self_attention.in_proj_*", "attn.proj.*": "self_attention.out_proj.*",
        },
    ),
    older={  # before torchvision 0.12, and in the weights that were published then
        "encoder.layers.encoder_layer_#.mlp.linear_1.*": "blocks.#.mlp.fc1.*",
        "encoder.layers.encoder_layer_#.mlp.linear_2.*": "blocks.#.mlp.fc2.*",
    },
    others={"heads.pre_logits.*": NO_REPRESENTATION},
    fixed={"act_layer": "gelu", "global_pool": "token"},
    assumed={"norm_eps": 1e-6},
)  # fmt: skip

# ---- transformers ----------------------------------------------------------------------------------------------------

# The names of version 5 are those that its models have in memory; files of versions 4 and 5 have version 4's.
_ATTENTION: dict[str, Table] = {
    "huggingface": {"attn.qkv.*": "attention.attention.{query,key,value}.*", "attn.proj.*": "attention.output.dense.*"},
    "huggingface-v5": {"attn.qkv.*": "attention.{q_proj,k_proj,v_proj}.*", "attn.proj.*": "attention.o_proj.*"},
}
_MLP: Table = {"mlp.fc1.*": "mlp.fc1.*", "mlp.fc2.*": "mlp.fc2.*"}
_VIT_MLP: Table = {"mlp.fc1.*": "intermediate.dense.*", "mlp.fc2.*": "output.dense.*"}
_SWIGLU: dict[str, Table] = {
    "huggingface": {"mlp.fc1.*": "mlp.weights_in.*", "mlp.fc2.*": "mlp.weights_out.*"},
    "huggingface-v5": {"mlp.fc1.*": "mlp.{gate_proj,up_proj}.*", "mlp.fc2.*": "mlp.down_proj.*"},
}
_EMBEDDINGS: Table = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "norm.*": "layernorm.*",
}


def _vit(schema: str, block: str, mlp: Table) -> Layout:
    """ViT, DeiT and ViTMAE."""
    outside = {**_EMBEDDINGS, "reg_token": "embeddings.distillation_token", "head.*": "classifier.*"}
    inside = {"norm1.*": "layernorm_before.*", **_ATTENTION[schema], "norm2.*": "layernorm_after.*", **mlp}
    return Layout(
        schema,
        "vit",
        _table(outside, block, inside),
        older={"cls_classifier.*": "head.*"},  # DeiT's, where it has a second head
        others={
            **dict.fromkeys(("embeddings.mask_token", "pooler.dense.*"), UNUSED),
            "decoder.**": BESIDE,
            "distillation_classifier.*": NO_SECOND_HEAD,
        },
        fixed={"global_pool": "token"},
        assumed={"norm_eps": 1e-12, "act_layer": "gelu"},
    )


def _class_half(weight: Tensor) -> Tensor:
    """[classes, 2D], on class token and mean of the patches, to [classes, D] where the mean does not count."""
    of_class, of_mean = weight.chunk(2, dim=1)
    if of_class.shape != of_mean.shape or (not weight.is_meta and of_mean.count_nonzero()):
        raise Refusal(TWO_PARTS)
    return of_class


def _with_zero_half(weight: Tensor) -> Tensor:
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


def _dinov2(schema: str, mlp: Table) -> Layout:
    outside: Table = {
        **_EMBEDDINGS,
        "reg_token": "embeddings.register_tokens",
        "head.weight": reshaped("classifier.weight", _class_half, _with_zero_half),
        "head.bias": "classifier.bias",
    }
    scales = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    inside = {"norm1.*": "norm1.*", "norm2.*": "norm2.*", **_ATTENTION[schema], **mlp, **scales}
    return Layout(
        schema,
        "dinov2",
        _table(outside, "encoder.layer.#", inside),
        others={"embeddings.mask_token": UNUSED},
        fixed={"global_pool": "token"},
        assumed={"norm_eps": 1e-6, "act_layer": "gelu"},
    )


def _clip(schema: str, prefix: str) -> Layout:
    """CLIP's vision tower."""
    outside: Table = {
        "cls_token": reshaped("embeddings.class_embedding", lambda x: x[None, None], lambda x: x[0, 0]),
        "pos_embed": reshaped("embeddings.position_embedding.weight", lambda x: x[None], lambda x: x[0]),
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "norm_pre.*": "pre_layrnorm.*",  # sic
        "norm.*": "post_layernorm.*",
        "head.weight": "visual_projection.weight",
    }
    attention = {"attn.qkv.*": "self_attn.{q_proj,k_proj,v_proj}.*", "attn.proj.*": "self_attn.out_proj.*"}
    inside = {"norm1.*": "layer_norm1.*", "norm2.*": "layer_norm2.*", **attention, **_MLP}
    return Layout(
        schema,
        "clip",
        _table(outside, "encoder.layers.#", inside),
        prefix,
        others=dict.fromkeys(("embeddings.position_ids", "text_model.**", "text_projection.weight"), BESIDE),
        fixed={"global_pool": "token"},
        assumed={"norm_eps": 1e-5, "act_layer": "quick_gelu"},
    )


VIT, VIT_V5 = _vit("huggingface", "encoder.layer.#", _VIT_MLP), _vit("huggingface-v5", "layers.#", _MLP)
CLIP = _clip("huggingface", "vision_model.")
# Each by its schema and its kind of model; where they are read, the encoder's names may stand behind these prefixes.
HUGGINGFACE = {
    ("huggingface", "vit"): VIT,
    ("huggingface-v5", "vit"): VIT_V5,
    **{(schema, "dinov2"): _dinov2(schema, _MLP) for schema in _ATTENTION},
    **{(schema, "dinov2-swiglu"): _dinov2(schema, mlp) for schema, mlp in _SWIGLU.items()},
    ("huggingface", "clip"): CLIP,
    ("huggingface-v5", "clip"): _clip("huggingface-v5", ""),  # CLIPVisionModel; with a projection the prefix stays
}
_PREFIXES = {"vit": ("", "vit.", "deit."), "dinov2": ("", "dinov2.", "dinov2_with_registers.")}

# ---- JAX -------------------------------------------------------------------------------------------------------------
# Flax keeps convolutions as [P_h, P_w, C, D], linear layers as [in, out], and attention with the heads apart:
# query, key and value as [D, heads, D/heads], the output as [heads, D/heads, D].

FLAX = ("jax", "big_vision")  # their schemas


def _norm(ours: str, theirs: str) -> Table:
    return {f"{ours}.weight": f"{theirs}/scale", f"{ours}.bias": f"{theirs}/bias"}


def _layer(ours: str, theirs: str, read: Callable[[Tensor], Tensor]) -> Table:
    return {f"{ours}.weight": reshaped(f"{theirs}/kernel", read), f"{ours}.bias": f"{theirs}/bias"}


def _qkv(attention: str, kind: str) -> Stored:
    def read(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1).T if part.dim() == 3 else part.flatten() for part in parts])

    return Stored(tuple(f"{attention}/{part}/{kind}" for part in ("query", "key", "value")), read)


def _jax(schema: str, positions: str, attention: int, mlp: int, norm2: int) -> Layout:
    """The layout with the numbers that Flax gave to the parts of a block."""
    block = "Transformer/encoderblock_#"
    attended, mixed = f"{block}/MultiHeadDotProductAttention_{attention}", f"{block}/MlpBlock_{mlp}"
    table: Table = {
        "cls_token": "cls",
        "pos_embed": positions,
        **_layer("patch_embed.proj", "embedding", lambda kernel: kernel.permute(3, 2, 0, 1)),
        **_norm("blocks.#.norm1", f"{block}/LayerNorm_0"),
        "blocks.#.attn.qkv.weight": _qkv(attended, "kernel"),
        "blocks.#.attn.qkv.bias": _qkv(attended, "bias"),
        **_layer("blocks.#.attn.proj", f"{attended}/out", lambda kernel: kernel.flatten(0, 1).T),
        **_norm("blocks.#.norm2", f"{block}/LayerNorm_{norm2}"),
        **_layer("blocks.#.mlp.fc1", f"{mixed}/Dense_0", torch.t),
        **_layer("blocks.#.mlp.fc2", f"{mixed}/Dense_1", torch.t),
        **_norm("norm", "Transformer/encoder_norm"),
        **_layer("head", "head", torch.t),
    }
    return Layout(
        schema,
        "vit",
        table,
        others={"pre_logits/**": NO_REPRESENTATION, "MAPHead_0/**": NO_POOLING},
        assumed={"norm_eps": 1e-6, "act_layer": "gelu_tanh"},  # JAX's gelu is the approximation by tanh
    )


LAYOUTS = (
    TIMM,
    TORCHVISION,
    *(
        replace(layout, prefix=prefix)
        for layout in HUGGINGFACE.values()
        for prefix in _PREFIXES.get(layout.family, (layout.prefix,))
    ),
    _jax("jax", "Transformer/posembed_input/pos_embedding", attention=1, mlp=3, norm2=2),
    _jax("big_vision", "pos_embedding", attention=0, mlp=0, norm2=1),
)
