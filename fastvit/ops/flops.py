"""What the ops cost, for torch's FLOP counter: as much as the convolution in their place; additions are free there."""

from __future__ import annotations

import sys
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastvit.ops.registry import OPS

__all__ = ["tell_counter"]

COUNTER = "torch.utils.flop_counter"


def tell_counter() -> None:
    """Give torch's FLOP counter the formulas, once somebody has imported it: Triton comes along, so FastViT does not.

    A counter that is counting already has a list of its own, which gets them too.
    """
    counter = sys.modules.get(COUNTER)
    if counter is None:
        return
    for op in OPS.values():
        if op.call not in counter.flop_registry:
            counter.register_flop_formula(op.call)(op.flops)
    for mode in _get_current_dispatch_mode_stack():
        own: Any = getattr(getattr(mode, "counter", None), "flop_registry", {})
        if own and OPS["patch_embed"].call not in own:
            own.update({op.call: counter.flop_registry[op.call] for op in OPS.values()})
