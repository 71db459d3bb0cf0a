"""Every kind of kernel on the smallest shapes, forward and backward: what is run under compute-sanitizer.

    python -m fastvit.benchmarks.campaign.tiny [DEVICE [BACKEND]]

Prints STARTED when the device has answered, and FINISHED at the end: a tool that can't work on this machine stops the
program before the one, a kernel that goes wrong before the other.
"""

from __future__ import annotations

import functools
import sys

import torch

from fastvit.validation import AddPositionCase, Case, PatchEmbedCase, make_inputs
from fastvit.validation.cases import DTYPES
from fastvit.validation.runner import backend_candidate, poisoned

STARTED, FINISHED = "the device answers", "all kernels ran"
_RAW = functools.partial(PatchEmbedCase, images="uint8", normalise=True)
# Of 128 x 128 as many as an H200 has multiprocessors: other kernels run where there are.
_MANY = functools.partial(PatchEmbedCase, batch=34, grid=(8, 8), patch=(8, 8), channels=1, width=1024)
CASES: tuple[tuple[Case, str], ...] = (
    (_RAW("patch 16, raw"), "bfloat16"),
    (_RAW("patch 16, raw, kept patches", grid=(3, 3), keep=4), "bfloat16"),
    (PatchEmbedCase("patch 16, channels last", layout="channels_last"), "bfloat16"),
    (PatchEmbedCase("patch 16"), "float16"),
    (PatchEmbedCase("patch 8", patch=(8, 8)), "bfloat16"),
    (_RAW("patch 14, raw", patch=(14, 14)), "bfloat16"),
    (PatchEmbedCase("patch 7, any width", patch=(7, 7), width=63, prefix=5), "float32"),
    (PatchEmbedCase("patch 16", images="float32", normalise=True), "float32"),
    (_MANY("many tiles, raw", images="uint8", normalise=True), "bfloat16"),
    (_MANY("many tiles"), "float16"),
    (AddPositionCase("positions"), "bfloat16"),
    (AddPositionCase("positions, any width", width=63, layout="sliced_rows"), "float32"),
)


def run(device: str = "cuda", backend: str = "triton") -> None:
    """Forward and backward of every case.

    Raises:
        RuntimeError: a result is not finite.
    """
    torch.zeros(1, device=device).item()
    print(STARTED, flush=True)
    forward = backend_candidate(backend, device).forward
    for case, dtype in CASES:
        inputs = make_inputs(case, DTYPES[dtype], device)
        leaves = {name: tensor for name, tensor in inputs.tensors.items() if tensor is not None}
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items() if tensor.is_floating_point()}
        with poisoned():
            tokens = forward(case.op, inputs, inputs.tensors)
            gradients = torch.autograd.grad(tokens, list(leaves.values()), inputs.grad)
        for name, result in {"tokens": tokens, **dict(zip(leaves, gradients, strict=True))}.items():
            if not bool(result.isfinite().all()):
                raise RuntimeError(f"{case.name}, {dtype}: {name} is not finite")
        print(f"{case.name}, {dtype}", flush=True)
    print(FINISHED, flush=True)


if __name__ == "__main__":
    run(*sys.argv[1:3])
