"""How products of float32 are made: at its own precision, or at TF32's, which tensor cores multiply."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvit.backend import multiplies_at_tf32


def product_precision(compute_dtype: torch.dtype) -> str:
    """ "ieee" or "tf32", in Triton's words."""
    return "tf32" if multiplies_at_tf32(compute_dtype) else "ieee"


@triton.jit
def round_to_tf32(x):  # fp32
    """To the nearest value with the ten explicit bits of TF32's mantissa, ties away from zero.

    Tensor cores drop the other thirteen bits, which makes every operand smaller: the errors add up rather than cancel.
    """
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)  # the sum may carry a NaN's bits into the sign
