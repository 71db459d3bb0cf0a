"""Models by name: those of `fastvit.create_model`, and a small one for 8×8 digits."""

from __future__ import annotations

from typing import Any

from torch import nn

from .data import ImageData
from .errors import OptionError
from .options import DIGITS_MODEL, TrainOptions

DIGITS_ARGUMENTS: dict[str, Any] = {
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
}


def model_arguments(options: TrainOptions, data: ImageData) -> dict[str, Any]:
    """What the data fixes about a model: its size, channels, classes and normalisation."""
    return {
        "img_size": data.image_size,
        "in_chans": data.channels,
        "num_classes": len(data.classes),
        "mean": data.mean,
        "std": data.std,
        "drop_path_rate": options.drop_path,
    }


def build_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The model called `name` with `arguments`, freshly initialised from torch's global random numbers."""
    import fastvit

    try:
        if name == DIGITS_MODEL:
            return initialise_narrow(fastvit.VisionTransformer(**{**DIGITS_ARGUMENTS, **arguments}))
        return fastvit.create_model(name, **arguments)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        reason = str(error) or type(error).__name__
        raise OptionError("model", name, f"a model that fits the data; {reason}") from error


def initialise_narrow(model: nn.Module) -> nn.Module:
    """Start a narrow model where a short training suffices.

    timm's standard deviation of 0.02 suits a width of 768, where it is near 1/sqrt(width). At 64 it makes every
    branch nearly zero, and tens of epochs pass before it learns. Glorot's rule follows the width, and positions must
    be visible beside the patches from the start.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("pos_embed"):
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim in (2, 4):
            nn.init.xavier_uniform_(parameter.data.flatten(1))
    return model
