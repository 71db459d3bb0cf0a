"""Holds a library to what every instruction set must do, and prints what is wrong: python checks.py LIBRARY OP...

Without an op all that the library has are validated, in a few cases; with some, these alone in all their cases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fastvit import functional, native
from fastvit.checks import ACTS

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def awkward_floats() -> torch.Tensor:
    """Every pattern of the upper bits with what lies about a tie below, and random ones."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = torch.cat([(upper + lower).flatten(), torch.randint(2**32, (2**16,))])
    return bits.to(torch.int32).view(torch.float32)


def converted(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By the library: added to nothing, in rows whose last vector is not whole."""
    rows = values[: values.numel() // 1023 * 1023].view(1, -1, 1023)
    return torch.ops.fastvit_native.add_position_cuda(rows, torch.zeros(rows.shape[1:]), None, dtype).flatten()


def wrong_conversions() -> list[str]:
    """Between float32 and 16 bits, held to torch's own, bit by bit; of not-a-number whether it is one."""
    found = []
    for dtype in SIXTEEN_BITS:
        for values, to in ((every_half(dtype), torch.float32), (awkward_floats(), dtype)):
            result = converted(values, to)
            expected = (values[: result.numel()].float() + 0.0).to(to)
            same = (result == expected) | (result.isnan() & expected.isnan())
            if native.instruction_set() == "avx512bf16" and to == torch.bfloat16:
                same |= expected.abs() < torch.finfo(dtype).tiny * (1 + torch.finfo(dtype).eps)  # taken for zero
            if not bool(same.all()):
                found.append(f"{values.dtype} to {to}: {values[: result.numel()][~same][:3].tolist()}")
    return found


def wrong_functions() -> list[str]:
    """Values of the activations one by one, where a norm would not see those near zero: within 2 ulp of x of the truth
    in float64."""
    found = []
    sizes = torch.cat([torch.linspace(0, 12, 2**18), torch.logspace(-38, 38, 2**12)])
    x = torch.cat([sizes, -sizes])[:, None]
    for name in ACTS:
        exact = functional.bias_act(x.double(), act=name, backend="reference")
        error = (functional.bias_act(x, act=name, backend="native") - exact).abs()
        worst = float((error / (x.double().abs() * torch.finfo(x.dtype).eps + 1e-300)).max())
        if worst > 2:
            found.append(f"{name}: {worst:.3g} ulp of x")
    return found


def main(library: str, *ops: str) -> None:
    native.LIBRARY.path = Path(library)
    from fastvit.validation import validate

    reason = native.why_unavailable("cpu")
    if reason:
        raise RuntimeError(reason)
    report = validate(["native"], ops or native.ops(), ["float32", "bfloat16"] if ops else None, quick=not ops)
    failed = [f"{row.quantity} of {row.case}, {row.dtype} {row.reason}" for row in report.failures]
    found = {"failed": failed, "conversions": wrong_conversions(), "functions": wrong_functions()}
    print(json.dumps({"set": native.instruction_set(), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
