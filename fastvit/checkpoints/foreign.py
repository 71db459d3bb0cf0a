"""What a checkpoint seems to be when it is no Vision Transformer that FastViT can express."""

from __future__ import annotations

import re
from collections.abc import Sequence

QUANTISED = "a model with quantised weights"
DEQUANTISE = "dequantise it first, and save its state_dict()"
_ONLY_TABLES = "FastViT adds a table of positions to the tokens"
_ONLY_PATCHES = "FastViT's tokens are projected patches"
_ONLY_COLUMNS = "FastViT's tokens keep one width and one grid from block to block"
_ONLY_IMAGES = "FastViT's models read images"
_NO_POOLING = "FastViT has no attention pooling"
_NOT_READ = "FastViT does not read these names; convert it to timm's first"

# Names are searched for these from top to bottom, the particular before the general.
# These appear among names that a plain ViT has too, and change what the model computes:
FEATURES = (
    (r"\.(lora_\w+|base_layer|ia3_l|hada_\w+|lokr_\w+|[bh]?oft_\w+|vera_lambda_\w+|modules_to_save)(\.|$)",
     "an adapter such as LoRA that is not merged into its model",
     "merge it first, with peft's merge_and_unload(), and save the state_dict() of what that returns"),
    (r"\.(absmax|quant_map|quant_state\.\w+|SCB|weight_format|qweight|qzeros|zero_point|_packed_params"
     r"|weight_(scale|scale_inv|packed|zero_point|qdata)|weight\._(data|scale))$", QUANTISED, DEQUANTISE),
    (r"layers\.\d+\.blocks\.\d+\..*relative_position|features\.\d+\.\d+\.attn\.relative_position",
     "a Swin Transformer", _ONLY_COLUMNS),
    (r"attn\.q_bias|layers?\.\d+\.lambda_1|beit.*relative_position", "a BEiT or EVA", _ONLY_TABLES),
    (r"relative_position|rel_pos", "a ViT with relative positions", _ONLY_TABLES),
    (r"\brope\b|rope_embed|rotary", "a ViT with rotary positions", _ONLY_TABLES),
    (r"patch_embed\.backbone|conv_root/|conv_bn_relu|patch_embeddings\.backbone", "a hybrid of a CNN and a ViT",
     _ONLY_PATCHES),
    (r"blocks\.\d+\.attns\.\d+|blocks\.\d+\.in_proj", "a ViT with parallel layers",
     "FastViT's blocks are sequential"),
    (r"(^|\.)head\.probe", "a SigLIP", _NO_POOLING),
    (r"mlp\.fc1_[gx]\.", "a ViT with a gated MLP in two parts", "FastViT's gated MLP has one first layer"),
)  # fmt: skip

# These too are looked for where no names of a ViT's patches, or of its blocks, were found:
MODELS = FEATURES + (
    (r"(^|\.)visual\.(conv1|transformer)", "a CLIP in OpenAI's names", _NOT_READ),
    (r"(^|\.)_?flat_param(_\d+)?$", "a part of a model that FSDP holds in shards", "save its full state_dict instead"),
    (r"downsample_layers\.|\.dwconv\.|conv_dw\.weight|dwconv\.weight", "a ConvNeXt or MobileNet", _ONLY_PATCHES),
    (r"layer[1-4]\.\d+\.conv1\.weight|resnet\.|encoder\.stages\.\d+", "a ResNet", _ONLY_PATCHES),
    (r"features\.\d+\.", "a convolutional network", _ONLY_PATCHES),
    (r"MixerBlock_\d+|mlp_tokens", "an MLP-Mixer", "FastViT's blocks have attention"),
    (r"word_embeddings|wte\.weight|embed_tokens|tok_embeddings|token_embedding|input_layernorm", "a text model",
     _ONLY_IMAGES),
    (r"(?<!encoder\.)layer\.\d+\.attention\.q_proj|storage_tokens", "a DINOv3", _ONLY_TABLES),
)  # fmt: skip


def found_in(table: tuple[tuple[str, str, str], ...], names: Sequence[str]) -> str:
    """What a model with these names is, and why FastViT can't express it; "" if nothing of `table` was found."""
    for pattern, model, reason in table:
        name = next((name for name in names if re.search(pattern, name)), None)
        if name is not None:
            return f"seems to be {model} (it has {name}): {reason}"
    return ""
