"""The registered torch ops: schema, fake, autograd, and the step from an op to the backend named in its call."""

from __future__ import annotations

from fastvit.ops.add_position import add_position
from fastvit.ops.add_position import run_forward as run_add_position
from fastvit.ops.decompositions import decompositions, plain_patch_embed
from fastvit.ops.patch_embed import patch_embed
from fastvit.ops.patch_embed import run_forward as run_patch_embed
from fastvit.ops.prepare_weight import prepare_weight
from fastvit.ops.registry import is_plain

__all__ = [
    "add_position",
    "decompositions",
    "is_plain",
    "patch_embed",
    "plain_patch_embed",
    "prepare_weight",
    "run_add_position",
    "run_patch_embed",
]
