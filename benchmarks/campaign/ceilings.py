"""Stage ceilings: what this GPU does at best, measured in the same campaign as everything that is held against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastvit.benchmarks.campaign.output import PASSED, Lines, report
from fastvit.benchmarks.problem import filled
from fastvit.benchmarks.rows import Row, commit, device_name, versions
from fastvit.benchmarks.timing import Call, Timing, float32_products, interleave

COMMAND = "make gpu STAGE="  # what a row of the campaign says it was measured by
OP = "ceiling"
# label → dtype, how fp32 products are made
PRODUCTS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32, tf32": (torch.float32, "tf32"),
    "float32, ieee": (torch.float32, "ieee"),
}


def ceilings(out: Path, device: str = "cuda", size: int = 8192, values: int = 2**28, seconds: float = 0.5) -> str:
    """Square matrix products of `size`, and a copy of `values` fp32 numbers, `seconds` of each."""
    lines, words = Lines(out / "bench.jsonl"), []
    for row, rate in measure(torch.device(device), size, values, seconds):
        lines.write([row.to_json()])
        words.append(f"{row.mode if row.moved_bytes else row.dtype} {rate}")
        print(words[-1], flush=True)
        report(figure="; ".join(words))
    return PASSED


def measure(device: torch.device, size: int, values: int, seconds: float) -> Iterator[tuple[Row, str]]:
    """A row for each ceiling, and its rate in words."""
    blank = Row(
        OP, "", "", "", "torch", "",
        device=device_name(device), versions=versions(device.type), commit=commit(), command=f"{COMMAND}ceilings",
    )  # fmt: skip
    for label, (dtype, precision) in PRODUCTS.items():
        timing = _time_product(device, size, dtype, precision, seconds)
        flops = 2.0 * size**3
        row = replace(blank, shape=f"{size} x {size} x {size}", dtype=label, mode="product", flops=flops)
        yield filled(row, timing), f"{flops / timing.median_us / 1e6:.1f} TFLOP/s"
    source = torch.rand(values, device=device)
    target = torch.empty_like(source)
    timing = _timed(lambda: target.copy_(source), device, seconds)
    moved = 2.0 * 4 * values
    row = replace(blank, shape=f"{values} values", dtype="float32", mode="copy", moved_bytes=moved)
    yield filled(row, timing), f"{moved / timing.median_us / 1e3:.0f} GB/s"


def _time_product(device: torch.device, size: int, dtype: torch.dtype, precision: str, seconds: float) -> Timing:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    with float32_products(precision):
        return _timed(lambda: torch.mm(left, right, out=product), device, seconds)


def _timed(call: Call, device: torch.device, seconds: float) -> Timing:
    (timing,) = interleave([call], device, seconds)
    return timing
