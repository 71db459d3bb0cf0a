"""Whole Vision Transformers with the same weights: ours, timm's, torchvision's and Hugging Face's.

Weights come from ours, whose parameters have timm's names. `residual` is the dtype of the residual stream under
bfloat16 autocast: with float32 class token and positions, as all libraries keep them, it is float32; where a rival is
to have bfloat16, as ours has with `residual_dtype`, these two parameters of it are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.benchmarks.rivals import imported
from fastvit.checkpoints.layouts import TORCHVISION, VIT, VIT_V5
from fastvit.checkpoints.naming import write_names

NAMES = {
    "Ti": "vit_tiny_patch16_224",
    "S": "vit_small_patch16_224",
    "B": "vit_base_patch16_224",
    "L": "vit_large_patch16_224",
}


def ours(model: str, residual: torch.dtype | None = None, **overrides: Any) -> nn.Module:
    """Ours, from seed 0."""
    from fastvit.model import create_model

    torch.manual_seed(0)
    half = residual if residual is not None and residual != torch.float32 else None
    return create_model(NAMES[model], residual_dtype=half, **overrides)


def timm(model: str, residual: torch.dtype | None = None, **overrides: Any) -> nn.Module:
    """timm's, with our weights."""
    module = imported("timm").create_model(NAMES[model], **overrides)
    module.load_state_dict(ours(model, **overrides).state_dict())
    return _with_residual(module, residual, ["cls_token", "pos_embed"])


def torchvision(model: str, residual: torch.dtype | None = None, **overrides: Any) -> nn.Module:
    """torchvision's, with our weights."""
    vit = imported("torchvision.models.vision_transformer")
    source = ours(model, **overrides)
    blocks, width, heads, hidden, classes = _sizes(source)
    module = vit.VisionTransformer(224, 16, blocks, heads, width, hidden, num_classes=classes)
    module.load_state_dict(write_names(TORCHVISION, "", source.state_dict()))
    return _with_residual(module, residual, ["class_token", "encoder.pos_embedding"])


def huggingface(model: str, residual: torch.dtype | None = None, **overrides: Any) -> nn.Module:
    """transformers' ViTForImageClassification, with our weights; returns logits."""
    vit = imported("transformers.models.vit.modeling_vit")
    source = ours(model, **overrides)
    blocks, width, heads, hidden, classes = _sizes(source)
    config = vit.ViTConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=hidden,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=classes,
        attn_implementation="sdpa",
    )
    module = vit.ViTForImageClassification(config)
    # transformers renamed the parameters in its version 5
    is_new = any(name.startswith("vit.layers.") for name in module.state_dict())
    module.load_state_dict(write_names(VIT_V5 if is_new else VIT, "vit.", source.state_dict()))
    names = ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]
    return _Logits(_with_residual(module, residual, names))


RIVALS: dict[str, Callable[..., nn.Module]] = {"timm": timm, "torchvision": torchvision, "huggingface": huggingface}


class _Logits(nn.Module):
    """A transformers model, called with images alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _sizes(model: Any) -> tuple[int, int, int, int, int]:
    """Depth, width, heads, the width inside the MLP, and classes."""
    block, classes = model.blocks[0], model.head.out_features
    return len(model.blocks), model.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features, classes


def _with_residual(module: nn.Module, residual: torch.dtype | None, names: list[str]) -> nn.Module:
    for name in names if residual is not None else ():
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.to(residual)
    return module
