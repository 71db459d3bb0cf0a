"""Models by name: those of `fastvit.create_model`, and a small one for 8×8 digits."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.model import VisionTransformer
from fastvit.model.variants import variant_arguments

from .errors import OptionError
from .options import DIGITS_MODEL

DIGITS_ARGUMENTS: dict[str, Any] = {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}


def model_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the model called `name`, with `given` on top. Raises OptionError."""
    try:
        return {**(DIGITS_ARGUMENTS if name == DIGITS_MODEL else variant_arguments(name)), **given}
    except ValueError as error:
        raise OptionError("model", name, f"{DIGITS_MODEL}, or a model that FastViT has; {error}") from error


def build_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model with all its `arguments`, freshly initialised from torch's global random numbers. Raises OptionError."""
    try:
        model = VisionTransformer(**arguments)
    except (ValueError, TypeError, AssertionError) as error:
        raise OptionError("model", name, f"a model that fits the data; {str(error) or type(error).__name__}") from error
    return initialise_narrow(model) if name == DIGITS_MODEL else model


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
