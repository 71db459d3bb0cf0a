"""The Vision Transformer: timm's arguments, parameter names and numerics over the fused patch embedding."""

from fastvit.model.patch_embed import PatchEmbed
from fastvit.model.variants import create_model, list_models
from fastvit.model.vision_transformer import VisionTransformer

__all__ = ["PatchEmbed", "VisionTransformer", "create_model", "list_models"]
