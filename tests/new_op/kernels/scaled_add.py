"""The Triton kernel of the toy op, and what it is compiled for."""

from __future__ import annotations

import triton.language as tl

from fastvit.kernels import manifest
from fastvit.kernels.jit import jit


@jit
def scaled_add(a_ptr, b_ptr, sum_ptr, size_units: tl.int32, factor: tl.float32, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size_units * 16  # so that whole vectors are inside, or outside
    a = tl.load(a_ptr + place, mask=inside).to(tl.float32)
    b = tl.load(b_ptr + place, mask=inside).to(tl.float32)
    tl.store(sum_ptr + place, (a + factor * b).to(sum_ptr.dtype.element_ty), mask=inside)


ENTRIES = manifest.Entries(__name__)
for _dtype in manifest.FLOATS:
    ENTRIES.add(
        "scaled_add",
        (_dtype,),
        dict(a=_dtype, b=_dtype, sum=_dtype),
        dict(BLOCK=1024),
        num_stages=1,
        copies=(("a_ptr", 8), ("b_ptr", 8)),
    )
