"""The tables: what timm, torchvision, transformers and Google's JAX code call the tensors of a Vision Transformer.

Our names are timm's. A table gives, for each of them, the library's name; "#" is the number of a block, "*" is
"weight" or "bias".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.checkpoints.naming import Layout, Refusal, Stored, Table, packed, reshaped

__all__ = ["LAYOUTS", "layout_named", "takes_head"]

NO_POOLING = "FastViT has no attention pooling"
NO_REPRESENTATION = "FastViT has no layer between pooling and head"
NO_SECOND_HEAD = "FastViT has one head, not a second one on the distillation token"
TWO_PARTS = "FastViT's head reads one pooled token, this one class token and mean together"


def takes_head(reason: str) -> bool:
    """Whether the head behind a refused part means nothing without it."""
    return reason in (NO_POOLING, NO_REPRESENTATION, TWO_PARTS)


# ---- timm --------------------------------------------------------------------------------------------------------

_TIMM_NAMES = (
    "cls_token",
    "reg_token",
    "pos_embed",
    "patch_embed.proj.*",
    "patch_embed.norm.*",
    "norm_pre.*",
    "blocks.#.norm1.*",
    "blocks.#.attn.qkv.*",
    "blocks.#.attn.q_norm.*",
    "blocks.#.attn.k_norm.*",
    "blocks.#.attn.norm.*",
    "blocks.#.attn.proj.*",
    "blocks.#.ls1.gamma",
    "blocks.#.norm2.*",
    "blocks.#.mlp.fc1.*",
    "blocks.#.mlp.norm.*",
    "blocks.#.mlp.fc2.*",
    "blocks.#.ls2.gamma",
    "norm.*",
    "fc_norm.*",
)

TIMM = Layout(
    schema="timm",
    family="vit",
    encoder={name: name for name in _TIMM_NAMES},
    head={"head.*": "head.*"},
    older={
        # DeiT's second token, DINOv2's and DeiT III's own files
        "dist_token": "reg_token",
        "register_tokens": "reg_token",
        "blocks.#.mlp.w12.*": "blocks.#.mlp.fc1.*",
        "blocks.#.mlp.w3.*": "blocks.#.mlp.fc2.*",
        "blocks.#.gamma_1": "blocks.#.ls1.gamma",
        "blocks.#.gamma_2": "blocks.#.ls2.gamma",
    },
    unused=("mask_token",),
    beside=("decoder_**",),
    refused={
        "head_dist.*": NO_SECOND_HEAD,
        "pre_logits.**": NO_REPRESENTATION,
        "attn_pool.**": NO_POOLING,
    },
)

# ---- torchvision -------------------------------------------------------------------------------------------------

_LAYER = "encoder.layers.encoder_layer_#"

TORCHVISION = Layout(
    schema="torchvision",
    family="vit",
    encoder={
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj.*": "conv_proj.*",
        "blocks.#.norm1.*": f"{_LAYER}.ln_1.*",
        "blocks.#.attn.qkv.*": f"{_LAYER}.self_attention.in_proj_*",
        "blocks.#.attn.proj.*": f"{_LAYER}.self_attention.out_proj.*",
        "blocks.#.norm2.*": f"{_LAYER}.ln_2.*",
        "blocks.#.mlp.fc1.*": f"{_LAYER}.mlp.0.*",
        "blocks.#.mlp.fc2.*": f"{_LAYER}.mlp.3.*",
        "norm.*": "encoder.ln.*",
    },
    head={"head.*": "heads.head.*"},
    # before torchvision 0.12, and in the weights that were published then
    older={f"{_LAYER}.mlp.linear_1.*": f"{_LAYER}.mlp.0.*", f"{_LAYER}.mlp.linear_2.*": f"{_LAYER}.mlp.3.*"},
    refused={"heads.pre_logits.*": NO_REPRESENTATION},
)

# ---- transformers: ViT, DeiT, ViTMAE -----------------------------------------------------------------------------

_VIT_EMBEDDINGS: Table = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
}

VIT = Layout(
    schema="huggingface",
    family="vit",
    prefixes=("", "vit.", "deit."),
    encoder={
        **_VIT_EMBEDDINGS,
        "blocks.#.norm1.*": "encoder.layer.#.layernorm_before.*",
        "blocks.#.attn.qkv.*": packed(
            "encoder.layer.#.attention.attention.query.*",
            "encoder.layer.#.attention.attention.key.*",
            "encoder.layer.#.attention.attention.value.*",
        ),
        "blocks.#.attn.proj.*": "encoder.layer.#.attention.output.dense.*",
        "blocks.#.norm2.*": "encoder.layer.#.layernorm_after.*",
        "blocks.#.mlp.fc1.*": "encoder.layer.#.intermediate.dense.*",
        "blocks.#.mlp.fc2.*": "encoder.layer.#.output.dense.*",
        "norm.*": "layernorm.*",
    },
    head={"head.*": "classifier.*"},
    older={"cls_classifier.*": "classifier.*"},  # DeiT's, where it has a second head
    unused=("embeddings.mask_token", "pooler.dense.*"),
    beside=("decoder.**",),
    refused={"distillation_classifier.*": NO_SECOND_HEAD},
)

VIT_V5 = Layout(
    schema="huggingface-v5",
    family="vit",
    prefixes=VIT.prefixes,
    encoder={
        **_VIT_EMBEDDINGS,
        "blocks.#.norm1.*": "layers.#.layernorm_before.*",
        "blocks.#.attn.qkv.*": packed(
            "layers.#.attention.q_proj.*", "layers.#.attention.k_proj.*", "layers.#.attention.v_proj.*"
        ),
        "blocks.#.attn.proj.*": "layers.#.attention.o_proj.*",
        "blocks.#.norm2.*": "layers.#.layernorm_after.*",
        "blocks.#.mlp.fc1.*": "layers.#.mlp.fc1.*",
        "blocks.#.mlp.fc2.*": "layers.#.mlp.fc2.*",
        "norm.*": "layernorm.*",
    },
    head=VIT.head,
    older=VIT.older,
    unused=VIT.unused,
    beside=VIT.beside,
    refused=VIT.refused,
)

# ---- transformers: DINOv2 ----------------------------------------------------------------------------------------


def _class_half(weight: Tensor) -> Tensor:
    """[classes, 2D], on class token and mean of the patches, to [classes, D] where the mean does not count."""
    of_class, of_mean = weight.chunk(2, dim=1)
    if of_class.shape != of_mean.shape or (not weight.is_meta and of_mean.count_nonzero()):
        raise Refusal(TWO_PARTS)
    return of_class


def _with_zero_half(weight: Tensor) -> Tensor:
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


_DINOV2_SHARED: Table = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*",
    "blocks.#.norm1.*": "encoder.layer.#.norm1.*",
    "blocks.#.ls1.gamma": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.norm2.*": "encoder.layer.#.norm2.*",
    "blocks.#.ls2.gamma": "encoder.layer.#.layer_scale2.lambda1",
    "norm.*": "layernorm.*",
}
_DINOV2_MLP: Table = {
    "blocks.#.mlp.fc1.*": "encoder.layer.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.fc2.*",
}
_DINOV2_ATTENTION: Table = {
    "blocks.#.attn.qkv.*": packed(
        "encoder.layer.#.attention.attention.query.*",
        "encoder.layer.#.attention.attention.key.*",
        "encoder.layer.#.attention.attention.value.*",
    ),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.output.dense.*",
}
_DINOV2_ATTENTION_V5: Table = {
    "blocks.#.attn.qkv.*": packed(
        "encoder.layer.#.attention.q_proj.*",
        "encoder.layer.#.attention.k_proj.*",
        "encoder.layer.#.attention.v_proj.*",
    ),
    "blocks.#.attn.proj.*": "encoder.layer.#.attention.o_proj.*",
}
_SWIGLU: Table = {
    "blocks.#.mlp.fc1.*": "encoder.layer.#.mlp.weights_in.*",
    "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.weights_out.*",
}
_SWIGLU_V5: Table = {
    "blocks.#.mlp.fc1.*": packed("encoder.layer.#.mlp.gate_proj.*", "encoder.layer.#.mlp.up_proj.*"),
    "blocks.#.mlp.fc2.*": "encoder.layer.#.mlp.down_proj.*",
}


def _dinov2(schema: str, attention: Table, mlp: Table) -> Layout:
    return Layout(
        schema=schema,
        family="dinov2",
        prefixes=("", "dinov2.", "dinov2_with_registers."),
        encoder={**_DINOV2_SHARED, **attention, **mlp},
        head={
            "head.weight": reshaped("classifier.weight", _class_half, _with_zero_half),
            "head.bias": "classifier.bias",
        },
        unused=("embeddings.mask_token",),
    )


DINOV2 = _dinov2("huggingface", _DINOV2_ATTENTION, _DINOV2_MLP)
DINOV2_V5 = _dinov2("huggingface-v5", _DINOV2_ATTENTION_V5, _DINOV2_MLP)
DINOV2_SWIGLU = _dinov2("huggingface", _DINOV2_ATTENTION, _SWIGLU)
DINOV2_SWIGLU_V5 = _dinov2("huggingface-v5", _DINOV2_ATTENTION_V5, _SWIGLU_V5)

# ---- transformers: CLIP's vision tower ---------------------------------------------------------------------------

_CLIP_ENCODER: Table = {
    "cls_token": reshaped("embeddings.class_embedding", lambda x: x[None, None], lambda x: x[0, 0]),
    "pos_embed": reshaped("embeddings.position_embedding.weight", lambda x: x[None], lambda x: x[0]),
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "norm_pre.*": "pre_layrnorm.*",  # sic
    "blocks.#.norm1.*": "encoder.layers.#.layer_norm1.*",
    "blocks.#.attn.qkv.*": packed(
        "encoder.layers.#.self_attn.q_proj.*",
        "encoder.layers.#.self_attn.k_proj.*",
        "encoder.layers.#.self_attn.v_proj.*",
    ),
    "blocks.#.attn.proj.*": "encoder.layers.#.self_attn.out_proj.*",
    "blocks.#.norm2.*": "encoder.layers.#.layer_norm2.*",
    "blocks.#.mlp.fc1.*": "encoder.layers.#.mlp.fc1.*",
    "blocks.#.mlp.fc2.*": "encoder.layers.#.mlp.fc2.*",
    "norm.*": "post_layernorm.*",
}


def _clip(schema: str, prefix: str) -> Layout:
    return Layout(
        schema=schema,
        family="clip",
        prefixes=(prefix,),
        encoder=_CLIP_ENCODER,
        head={"head.weight": "visual_projection.weight"},
        beside=("embeddings.position_ids", "text_model.**", "text_projection.weight", "logit_scale"),
        projection=True,
    )


CLIP = _clip("huggingface", "vision_model.")
CLIP_V5 = _clip("huggingface-v5", "")  # CLIPVisionModel; with a projection the prefix stays

# ---- JAX ---------------------------------------------------------------------------------------------------------
# Flax keeps convolutions as [P_h, P_w, C, D], linear layers as [in, out], and attention with the heads apart:
# query, key and value as [D, heads, D/heads], the output as [heads, D/heads, D].


def _flax(name: str) -> Stored:
    return reshaped(name, lambda kernel: kernel.T if kernel.dim() == 2 else kernel.permute(3, 2, 0, 1))


def _flax_qkv(*names: str) -> Stored:
    def read(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1).T if part.dim() == 3 else part.flatten() for part in parts])

    return Stored(names, read)


def _flax_encoder(pos_embed: str, attention: str, mlp: str, norm2: str) -> Table:
    block = "Transformer/encoderblock_#"
    parts = [f"{block}/{attention}/{part}" for part in ("query", "key", "value")]
    return {
        "cls_token": "cls",
        "pos_embed": pos_embed,
        "patch_embed.proj.weight": _flax("embedding/kernel"),
        "patch_embed.proj.bias": "embedding/bias",
        "blocks.#.norm1.weight": f"{block}/LayerNorm_0/scale",
        "blocks.#.norm1.bias": f"{block}/LayerNorm_0/bias",
        "blocks.#.attn.qkv.weight": _flax_qkv(*[f"{part}/kernel" for part in parts]),
        "blocks.#.attn.qkv.bias": _flax_qkv(*[f"{part}/bias" for part in parts]),
        "blocks.#.attn.proj.weight": reshaped(f"{block}/{attention}/out/kernel", lambda kernel: kernel.flatten(0, 1).T),
        "blocks.#.attn.proj.bias": f"{block}/{attention}/out/bias",
        "blocks.#.norm2.weight": f"{block}/{norm2}/scale",
        "blocks.#.norm2.bias": f"{block}/{norm2}/bias",
        "blocks.#.mlp.fc1.weight": _flax(f"{block}/{mlp}/Dense_0/kernel"),
        "blocks.#.mlp.fc1.bias": f"{block}/{mlp}/Dense_0/bias",
        "blocks.#.mlp.fc2.weight": _flax(f"{block}/{mlp}/Dense_1/kernel"),
        "blocks.#.mlp.fc2.bias": f"{block}/{mlp}/Dense_1/bias",
        "norm.weight": "Transformer/encoder_norm/scale",
        "norm.bias": "Transformer/encoder_norm/bias",
    }


def _jax(schema: str, encoder: Table) -> Layout:
    return Layout(
        schema=schema,
        family="vit",
        prefixes=("", "opt/target/", "params/", "params/img/"),
        encoder=encoder,
        head={"head.weight": _flax("head/kernel"), "head.bias": "head/bias"},
        head_has_prefix=True,
        beside=("params/txt/**", "params/t", "params/b", "opt/state/**"),
        refused={"pre_logits/**": NO_REPRESENTATION, "MAPHead_0/**": NO_POOLING},
    )


JAX = _jax(
    "jax",
    _flax_encoder(
        pos_embed="Transformer/posembed_input/pos_embedding",
        attention="MultiHeadDotProductAttention_1",
        mlp="MlpBlock_3",
        norm2="LayerNorm_2",
    ),
)
BIG_VISION = _jax(
    "big_vision",
    _flax_encoder(
        pos_embed="pos_embedding",
        attention="MultiHeadDotProductAttention_0",
        mlp="MlpBlock_0",
        norm2="LayerNorm_1",
    ),
)

LAYOUTS = (
    TIMM,
    TORCHVISION,
    VIT,
    VIT_V5,
    DINOV2,
    DINOV2_V5,
    DINOV2_SWIGLU,
    DINOV2_SWIGLU_V5,
    CLIP,
    CLIP_V5,
    JAX,
    BIG_VISION,
)


def layout_named(schema: str, family: str, swiglu: bool = False) -> Layout:
    """The layout of a schema for a family."""
    found = [layout for layout in LAYOUTS if layout.schema == schema and layout.family == family]
    return found[1] if swiglu else found[0]
