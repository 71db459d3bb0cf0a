"""A look at a state_dict before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["check_state_dict"]


def check_state_dict(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> None:
    """Raise where `state_dict` does not fit, before torch has copied the part of it that does.

    Raises:
        RuntimeError: as torch would, but with every parameter still as it was; the message names each parameter with
            both shapes, and with `strict` each missing and unexpected one.
    """
    own = {prefix + name: tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    given = {name for name in state_dict if name.startswith(prefix)}
    problems = [
        problem
        for name, tensor in own.items()
        if name in given and (problem := _mismatch(name, state_dict[name], tensor))
    ]
    if strict:
        problems += [f"{name}: missing in the checkpoint" for name in own if name not in given]
        problems += [f"{name}: not a parameter of this model" for name in sorted(given - own.keys())]
    if problems:
        lines = "\n  ".join(problems)
        raise RuntimeError(f"state_dict: does not fit this {type(module).__name__}; nothing was loaded.\n  {lines}")


def _mismatch(name: str, given: object, own: Tensor) -> str:
    if not isinstance(given, Tensor):
        return f"{name}: expected a tensor, the checkpoint has a {type(given).__name__}"
    if given.shape != own.shape:
        hint = "; fastvit.positions.resample_pos_embed fits it" if name.endswith("pos_embed") else ""
        return f"{name}: shape {list(given.shape)} in the checkpoint, {list(own.shape)} in the model{hint}"
    if own.is_floating_point() and not given.is_floating_point():
        return f"{name}: {given.dtype} in the checkpoint, {own.dtype} in the model"
    return ""
