"""Shared by the tests of checkpoints: random weights, and other libraries' tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.files import Checkpoint, read_checkpoint
from fastvit.checkpoints.recognition import Recognised, recognise
from tests.libraries import peer

# Two blocks, three heads, and for width and MLP numbers that are nothing else.
WIDTH, DEPTH, HEADS, HIDDEN, PATCH, IMAGE, CLASSES = 48, 2, 3, 96, 8, 32, 7

_TRANSFORMERS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_labels": CLASSES,
}
_MODULES = {"ViTMAE": "vit_mae", "ViT": "vit", "DeiT": "deit", "Dinov2WithRegisters": "dinov2_with_registers"}
_MODULES |= {"Dinov2": "dinov2", "CLIPVision": "clip"}


@torch.no_grad()
def scrambled(model: nn.Module) -> nn.Module:
    """Every parameter random: zeros and ones, as many start, would hide mistakes."""
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 and parameter.shape[0] > 1 else 1.0
        parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


class Calls:
    """Pickled, the call of `function`, which unpickling would make."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def agree(got: Tensor, truth: Tensor) -> None:
    """Two outputs are the same to float32's rounding."""
    assert got.shape == truth.shape
    got, truth = got.detach(), truth.detach()
    error = float((got.double() - truth.double()).norm() / truth.double().norm())
    assert error <= 1e-5, f"relative error {error:.2e}"


def same_bits(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """The same names, and the same bits under each."""
    assert got.keys() == truth.keys()
    different = [name for name in truth if got[name].dtype != truth[name].dtype or not got[name].equal(truth[name])]
    assert not different


def refusal(source: Any, **arguments: Any) -> str:
    """The message that `source` is refused with: one line that is no longer than a screen has room for."""
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(source, **arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 + len(str(source))
    assert not isinstance(source, Path) or message.startswith(str(source))
    return message


def recognised(state: Mapping[str, Tensor], config: Any = None, **known: Any) -> Recognised:
    """What a state_dict with this config is; its arguments can be written as JSON."""
    found = recognise(Checkpoint(dict(state), config, "state_dict", "state_dict"), **known)
    json.dumps(found.arguments)
    return found


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, IMAGE, IMAGE)


@pytest.fixture
def transformers() -> Callable[..., Any]:
    """Build a tiny model of transformers, such as "ViTModel"; arguments go to its config."""

    def build(name: str, **config: Any) -> Any:
        start = next(start for start in _MODULES if name.startswith(start))
        module = peer(f"transformers.models.{_MODULES[start]}.modeling_{_MODULES[start]}")
        made = getattr(module, f"{start}Config")(**{**_TRANSFORMERS, **config})
        return scrambled(getattr(module, name)(made))

    return build


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """Save a model of transformers as it goes to the hub; returns the folder."""

    def save(model: Any) -> Path:
        model.save_pretrained(tmp_path / "hub")
        return tmp_path / "hub"

    return save


@pytest.fixture
def timm_vit() -> Callable[..., Any]:
    """Build timm's VisionTransformer, tiny."""

    def build(**arguments: Any) -> Any:
        vit = peer("timm.models.vision_transformer")
        tiny = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
        return scrambled(vit.VisionTransformer(**{**tiny, "mlp_ratio": 2.0, "num_classes": CLASSES, **arguments}))

    return build


@pytest.fixture
def torchvision_vit() -> Callable[..., Any]:
    """Build torchvision's VisionTransformer, tiny."""

    def build(**arguments: Any) -> Any:
        vit = peer("torchvision.models.vision_transformer")
        return scrambled(
            vit.VisionTransformer(IMAGE, PATCH, DEPTH, HEADS, WIDTH, HIDDEN, num_classes=CLASSES, **arguments)
        )

    return build
