"""A block's addition and the norm behind it in one pass, against the eager ops, one after another."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastvit import tuning
from fastvit.benchmarks import tune
from fastvit.benchmarks.contenders import Task, against
from fastvit.benchmarks.problem import BOTH, WIDTHS, Plan, Problem
from fastvit.benchmarks.rivals import Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.validation import AddNormCase, AddNormInputs, make_inputs
from fastvit.validation.ops.add_norm import plain

TOKENS = 197
# label → dtype of branch and result, and what else a case has
PRECISIONS = {
    "float32": (torch.float32, {}),
    "bfloat16, fp32 stream": (torch.bfloat16, {"stream": "float32", "parameters": "mixed"}),
    "bfloat16, fp32 stream, LayerScale and DropPath": (
        torch.bfloat16,
        {"stream": "float32", "parameters": "mixed", "scale": True, "keep": True},
    ),
    "bfloat16": (torch.bfloat16, {"parameters": "mixed"}),
}


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    on_gpu = device.type == "cuda"
    if size == "tiny":
        shapes = [("Ti", 2)]
    else:
        batches = ((256,) if size == "small" else (64, 256)) if on_gpu else ((16,) if size == "small" else (1, 16))
        models = ("S", "B") if size == "small" else tuple(WIDTHS)
        shapes = [(model, batch) for model in models for batch in batches]
    return [
        (
            f"add_norm ViT-{model}, batch {batch}, {precision}",
            functools.partial(_problems_of, model, batch, precision, device, size != "tiny"),
        )
        for model, batch in shapes
        for precision in PRECISIONS
    ]


def _problems_of(
    model: str, batch: int, precision: str, device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    dtype, options = PRECISIONS[precision]
    name = f"ViT-{model}, {TOKENS} tokens, batch {batch}"
    case = AddNormCase(name, batch=batch, tokens=TOKENS, width=WIDTHS[model], **options)  # type: ignore[arg-type]
    task = Task("add_norm", make_inputs(case, dtype, device), device)
    contenders = against("add + layer_norm", _eager, with_compiled)
    return task.problems("add_norm", name, precision, "contiguous", contenders, _work)


def _eager(inputs: AddNormInputs) -> Solution:
    leaves = [tensor for tensor in inputs.tensors.values() if tensor is not None]

    def run() -> tuple[Tensor, Tensor]:
        return plain(inputs, inputs.tensors)

    return Solution(run, leaves)


def _work(inputs: AddNormInputs, mode: str) -> tuple[float, float]:
    """Backward reads the sum, both gradients and, with a scale, the branch; it writes those of residual and branch."""
    residual, branch, scale = (inputs.tensors[name] for name in ("residual", "branch", "scale"))
    total, normed = inputs.grads.values()
    read = _bytes(residual) + _bytes(branch)
    forward = read + _bytes(total) + _bytes(normed)
    backward = 2 * _bytes(total) + _bytes(normed) + read + (_bytes(branch) if scale is not None else 0)
    return 8.0 * total.numel(), float(forward + (backward if mode == BOTH else 0))


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    for compute in dict.fromkeys(tune.PRECISIONS[precision][0] for precision in scope.precisions):
        served = AddNormCase(str(size), batch=size.batch, tokens=size.patches + 1, width=size.width)
        cases = {tuning.FORWARD: served, tuning.TRAINING: replace(served, stream="float32", parameters="mixed")}
        yield Measurement(f"add_norm {size}, {str(compute).removeprefix('torch.')}", cases, compute)


def _problem(mode: str, inputs: AddNormInputs) -> tuning.Problem:
    residual, branch = inputs["residual"], inputs["branch"]
    normed, has_scale = inputs.grads["normed"], inputs.tensors["scale"] is not None
    shape = (residual.shape[-1],)
    return tuning.Problem("add_norm", mode, residual.dtype, branch.dtype, normed.dtype, shape, has_scale)


TUNED = Tuned(_measurements, _problem)
