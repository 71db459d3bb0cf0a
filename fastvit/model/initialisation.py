"""Initial weights: timm's schemes, drawing the same random numbers in the same order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SCHEMES", "initialise", "trunc_normal_"]

SCHEMES = ("", "skip", "reset", "jax", "jax_nlhb", "moco")


@torch.no_grad()
def trunc_normal_(tensor: Tensor, std: float = 1.0, low: float = -2.0, high: float = 2.0) -> Tensor:
    """Fill with a normal distribution of mean 0, cut off at `low` and `high`, by the inverse of its integral.

    Written out because torch's own function draws differently from one version to the next.
    """
    lower, upper = math.erf(low / std / math.sqrt(2.0)), math.erf(high / std / math.sqrt(2.0))
    tensor.uniform_(lower, upper).erfinv_().mul_(std * math.sqrt(2.0))
    return tensor.clamp_(min=low, max=high)


@torch.no_grad()
def lecun_normal_(weight: Tensor) -> Tensor:
    """A truncated normal of variance 1 / fan_in."""
    fan_in = weight[0].numel()
    # 0.8796… is the standard deviation of the standard normal cut off at ±2.
    return trunc_normal_(weight).mul_(math.sqrt(1.0 / fan_in) / 0.87962566103423978)


def initialise(model: nn.Module, scheme: str, head_bias: float = 0.0, reset: bool = True) -> None:
    """Initialise every submodule of `model`, innermost first.

    Args:
        scheme: "" (timm's own), "jax", "jax_nlhb", "moco", or "reset" (each module's own reset_parameters).
        head_bias: bias of the head in the "jax" schemes.
        reset: also reset modules the scheme does not name; needed where parameters were never filled (meta device).
    """
    linear = {"": _timm, "jax": _jax, "jax_nlhb": _jax, "moco": _moco}.get(scheme)
    module: Any  # init_weights and reset_parameters are looked up by name
    for name, module in _innermost_first(model, ""):
        if linear is not None and linear(module, name, head_bias):
            continue
        if linear is not None and hasattr(module, "init_weights"):
            module.init_weights()
        elif reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _innermost_first(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Every module below `module`, with its name, children before their parent."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        name = f"{prefix}.{name}" if prefix else name
        found += _innermost_first(child, name)
        found.append((name, child))
    return found


def _timm(module: nn.Module, name: str, head_bias: float) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    trunc_normal_(module.weight, std=0.02)
    _zero_bias(module)
    return True


def _jax(module: nn.Module, name: str, head_bias: float) -> bool:
    if isinstance(module, nn.Linear):
        if name.startswith("head"):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, head_bias)
            return True
        nn.init.xavier_uniform_(module.weight)
        if "mlp" in name and module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6)
        else:
            _zero_bias(module)
        return True
    if isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
        _zero_bias(module)
        return True
    return False


def _moco(module: nn.Module, name: str, head_bias: float) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    if "qkv" in name:  # three matrices side by side, each with a fan-out of its own
        bound = math.sqrt(6.0 / float(module.weight.shape[0] // 3 + module.weight.shape[1]))
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        nn.init.xavier_uniform_(module.weight)
    _zero_bias(module)
    return True


def _zero_bias(module: nn.Linear | nn.Conv2d) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
