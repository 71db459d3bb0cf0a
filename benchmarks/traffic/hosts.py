"""The models whose training step is counted, in each setting, and why some are not to be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.benchmarks import models
from fastvit.benchmarks.problem import WIDTHS
from fastvit.benchmarks.rivals import imported
from fastvit.interop import accelerate

PLAIN, SCALED = "plain", "layerscale+droppath"
SETTINGS = (PLAIN, SCALED)
DEPTHS = {"Ti": 12, "S": 12, "B": 12, "L": 24}
_OPTIONS: dict[str, dict[str, Any]] = {PLAIN: {}, SCALED: {"init_values": 1e-5, "drop_path_rate": 0.1}}
_LISTS = (nn.ModuleList, nn.Sequential)  # of which a model's blocks are in the largest


class LeftOut(ValueError):
    """A host has no such setting; the message says why."""


def _dinov2(size: str, residual: torch.dtype, depth: int, **_: Any) -> nn.Module:
    """transformers' classifier on DINOv2, at patch 16 and 224 pixels as the others."""
    dinov2 = imported("transformers.models.dinov2.modeling_dinov2")
    config = dinov2.Dinov2Config(
        hidden_size=WIDTHS[size],
        num_attention_heads=WIDTHS[size] // 64,
        num_hidden_layers=depth,
        image_size=224,
        patch_size=16,
        drop_path_rate=_OPTIONS[SCALED]["drop_path_rate"],
        num_labels=1000,
        attn_implementation="sdpa",
    )
    module = dinov2.Dinov2ForImageClassification(config)
    for name in ("cls_token", "position_embeddings"):
        parameter = getattr(module.dinov2.embeddings, name)
        parameter.data = parameter.data.to(residual)
    return models._Logits(module)


HOSTS: dict[str, Callable[..., nn.Module]] = {
    "timm": models.timm,
    "torchvision": models.torchvision,
    "transformers vit": models.huggingface,
    "transformers dinov2": _dinov2,
    "fastvit": models.ours,
}
_WITHOUT = {
    ("torchvision", SCALED): "its Vision Transformer has neither LayerScale nor DropPath",
    ("transformers vit", SCALED): "its ViT has neither LayerScale nor DropPath",
    ("transformers dinov2", PLAIN): "its DINOv2 always has LayerScale",
}


def build(host: str, size: str, setting: str, stream: torch.dtype, depth: int, accelerated: bool) -> nn.Module:
    """A host's model on the CPU, in training mode.

    Where the residual stream is to be bfloat16, class token, positions and LayerScale are bfloat16 parameters, as
    promotion to their dtype would make it float32 again; FastViT's own has `residual_dtype`.

    Raises:
        LeftOut: the host has no such setting.
        Unavailable: its library is not here.
        Unsupported: it can't be accelerated.
    """
    if (host, setting) in _WITHOUT:
        raise LeftOut(_WITHOUT[host, setting])
    module = HOSTS[host](size, stream, depth=depth, **_OPTIONS[setting])
    if host != "fastvit":
        for name, parameter in module.named_parameters():
            if name.endswith((".gamma", ".lambda1")):
                parameter.data = parameter.data.to(stream)
    if accelerated:
        accelerate(module, residual_dtype=stream, backend="triton")
    return module.train()


def check_stream(module: nn.Module, images: Tensor, stream: torch.dtype) -> None:
    """Run the model as it is, and look at what its last block gives to the next norm.

    Raises:
        LeftOut: that is not of the dtype asked for.
    """
    found: list[torch.dtype] = []

    def look(block: nn.Module, arguments: Any, result: Any) -> None:
        found.append((result if isinstance(result, Tensor) else result[0]).dtype)

    blocks: Any = max((part for part in module.modules() if isinstance(part, _LISTS)), key=_parameters)
    handle = blocks[-1].register_forward_hook(look)
    with torch.no_grad():
        module(images)
    handle.remove()
    if found != [stream]:
        raise LeftOut(f"its residual stream is {', '.join(map(str, found))} under autocast, not {stream}")


def _parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
