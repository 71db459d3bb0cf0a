"""The primitives of the CUDA kernels, one by one: a GPU's against the emulation's reading of them, byte for byte.

The emulation proves the kernels only as far as it is right about `mma`, `ldmatrix`, `cp.async`, `wgmma`, `mbarrier` and
the rest. On a machine with a GPU this shows whether it is. Sums are of small integers, so that no order of additions
matters.
"""

from __future__ import annotations

from typing import Any

import torch

from fastvit import backend as backends
from fastvit.validation.report import FAILED, PASSED, SKIPPED, Report, Row
from fastvit.validation.runner import Progress

TITLE = "Primitives of the GPU against the emulation"
DRAWS = 8  # random inputs for each primitive


def check_primitives(device: str | torch.device | None = None, progress: Progress | None = None) -> Report:
    """Run every primitive on the GPU and in the emulation, on the same random bytes.

    Args:
        device: a CUDA device; default: the current one.
        progress: called as progress(done, total, description).

    Returns:
        A row for each primitive. Where either side can't run, one row that is skipped, with the reason.
    """
    where = torch.device(device or "cuda")
    reason = backends.why_unavailable("cuda", where.type) or backends.why_unavailable("emulated", "cpu")
    if reason:
        return Report((_row(where, "all", SKIPPED, reason=reason),), TITLE)
    from fastvit.emulated import call

    capability = torch.cuda.get_device_capability(where)
    with call.emulation(capability=10 * capability[0] + capability[1]):
        known = call.library().primitives()
        rows = []
        for which, (name, input_bytes, output_bytes) in enumerate(known):
            if progress:
                progress(which, len(known), name)
            rows.append(_compared(which, name, input_bytes, output_bytes, where))
    if progress:
        progress(len(known), len(known), "done")
    return Report(tuple(rows), TITLE)


def _row(device: torch.device, name: str, status: str, **rest: Any) -> Row:
    return Row("cuda", "primitive", "bytes", name, "bytes", status, device=str(device), **rest)


def _compared(which: int, name: str, input_bytes: int, output_bytes: int, device: torch.device) -> Row:
    """A primitive on DRAWS inputs; the error is the share of bytes that differ."""
    from fastvit.emulated import call

    library, emulated_device = call.library(), call.device()
    if not library.has_primitive(emulated_device, which):
        return _row(device, name, SKIPPED, reason="not a primitive of this GPU's architecture")
    generator = torch.Generator().manual_seed(which)
    for draw in range(DRAWS):
        given = torch.randint(256, (input_bytes,), dtype=torch.uint8, generator=generator)
        emulated = torch.empty(output_bytes, dtype=torch.uint8)
        library.run_primitive(emulated_device, which, call.view(given), call.view(emulated))
        found = torch.full_like(emulated, 0xA5, device=device)
        try:
            torch.ops.fastvit.run_primitive_cuda(which, given.to(device), found)
        except RuntimeError as error:  # the library may have been compiled for other architectures
            return _row(device, name, FAILED, reason=str(error).partition("\n")[0])
        differing = (found.cpu() != emulated).nonzero().flatten()
        if len(differing):
            where = f"from byte {int(differing[0])} on, draw {draw}"
            return _row(device, name, FAILED, error=len(differing) / output_bytes, where=where)
    return _row(device, name, PASSED)
