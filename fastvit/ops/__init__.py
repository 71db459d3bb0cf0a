"""The registered torch ops, `torch.ops.fastvit.*`: one file each, with its schema, fake, gradients and decomposition.

Each is declared by `registry.define` in a file of this folder, and found by that alone.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastvit.ops.decompositions import decompositions
from fastvit.ops.flops import tell_counter
from fastvit.ops.registry import OPS, Op, flat, is_plain

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
# An op, rather than the file of its name, is what users look for here.
globals().update({name: op.call for name, op in OPS.items()})

__all__ = ["OPS", "Op", "decompositions", "flat", "is_plain", "tell_counter"]
__all__ += list(OPS)
