"""Positions and class token for tokens from elsewhere: cat, add and cast in one pass, against the eager ops."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastvit import tuning
from fastvit.benchmarks import tune
from fastvit.benchmarks.contenders import Task, against, token_shapes
from fastvit.benchmarks.problem import BOTH, WIDTHS, Plan, Problem
from fastvit.benchmarks.rivals import Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.validation import AddPositionCase, Inputs, make_inputs

# label → (dtype of the tokens, dtype of positions and prefix)
PRECISIONS = {"float32": (torch.float32, "same"), "bfloat16": (torch.bfloat16, "same"),
              "bfloat16, fp32 positions": (torch.bfloat16, "mixed")}  # fmt: skip


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    shapes = [("Ti", 2, 4)] if size == "tiny" else token_shapes(size, device, 196)
    return [
        (
            f"add_position ViT-{model}, batch {batch}, {precision}",
            functools.partial(_problems_of, model, batch, patches, precision, device, size != "tiny"),
        )
        for model, batch, patches in shapes
        for precision in PRECISIONS
    ]


def _problems_of(
    model: str, batch: int, patches: int, precision: str, device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    dtype, parameters = PRECISIONS[precision]
    name = f"ViT-{model}, {patches} patches, batch {batch}"
    case = AddPositionCase(name, batch=batch, patches=patches, width=WIDTHS[model], parameters=parameters)
    task = Task("add_position", make_inputs(case, dtype, device), device)
    contenders = against("cat + add", _eager, with_compiled)
    return task.problems("add_position", name, precision, "contiguous", contenders, _work)


def _eager(inputs: Inputs) -> Solution:
    tokens, pos_embed, prefix = leaves = [inputs[name] for name in ("tokens", "pos_embed", "prefix")]

    def run() -> Tensor:
        return (torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1) + pos_embed).to(tokens.dtype)

    return Solution(run, leaves)


def _work(inputs: Inputs, mode: str) -> tuple[float, float]:
    """Backward reads the gradient once more; the tokens' own gradient is a view of it."""
    tokens, grad = (tensor.nbytes for tensor in (inputs["tokens"], inputs.grad))
    return float(inputs.grad.numel()), float(tokens + grad * (2 if mode == BOTH else 1))


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    for compute in dict.fromkeys(tune.PRECISIONS[precision][0] for precision in scope.precisions):
        served = AddPositionCase(str(size), batch=size.batch, patches=size.patches, width=size.width)
        cases = {tuning.FORWARD: served, tuning.TRAINING: replace(served, parameters="mixed")}
        yield Measurement(f"add_position {size}, {str(compute).removeprefix('torch.')}", cases, compute)


def _problem(mode: str, inputs: Inputs) -> tuning.Problem:
    tokens, positions = inputs["tokens"], inputs["pos_embed"]
    return tuning.Problem("add_position", mode, tokens.dtype, positions.dtype, inputs.out, (tokens.shape[2],), False)


TUNED = Tuned(_measurements, _problem)
