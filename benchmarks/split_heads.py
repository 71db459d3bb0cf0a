"""The gradients of queries, keys and values brought into one, and summed for the bias, against stacking and summing.

Forward is made of views: forward and backward together are timed, on gradients laid out as flash attention leaves them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvit import tuning
from fastvit.benchmarks import tune
from fastvit.benchmarks.contenders import Task, against, token_shapes
from fastvit.benchmarks.problem import BOTH, WIDTHS, Plan, Problem
from fastvit.benchmarks.rivals import BiasOfProduct, Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.validation import SplitHeadsCase, SplitHeadsInputs, make_inputs
from fastvit.validation.ops.split_heads import plain

# label → (dtype of qkv, dtype of the bias)
PRECISIONS = {"float32": (torch.float32, "same"), "bfloat16": (torch.bfloat16, "same"),
              "bfloat16, fp32 bias": (torch.bfloat16, "mixed")}  # fmt: skip
HEAD = 64


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    shapes = [("Ti", 2, 4)] if size == "tiny" else token_shapes(size, device, 197)
    return [
        (
            f"split_heads ViT-{model}, batch {batch}, {precision}",
            functools.partial(_problems_of, model, batch, tokens, precision, device, size != "tiny"),
        )
        for model, batch, tokens in shapes
        for precision in PRECISIONS
    ]


def _problems_of(
    model: str, batch: int, tokens: int, precision: str, device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    dtype, parameters = PRECISIONS[precision]
    name = f"ViT-{model}, {tokens} tokens, batch {batch}"
    case = _case(name, model, batch, tokens, parameters)
    task = Task("split_heads", make_inputs(case, dtype, device), device)
    contenders = against("stack + sum", _eager, with_compiled)
    return task.problems("split_heads", name, precision, "by tokens", contenders, _work, modes=(BOTH,))


def _case(name: str, model: str, batch: int, tokens: int, parameters: str) -> SplitHeadsCase:
    return SplitHeadsCase(
        name, batch=batch, tokens=tokens, heads=max(1, WIDTHS[model] // HEAD), width=HEAD, parameters=parameters
    )


def _eager(inputs: SplitHeadsInputs) -> Solution:
    qkv, bias = leaves = [inputs[name] for name in ("qkv", "bias")]

    def run() -> tuple[Tensor, ...]:
        return plain(inputs, {"qkv": BiasOfProduct.apply(qkv, bias), "bias": None})

    return Solution(run, leaves)


def _work(inputs: SplitHeadsInputs, mode: str) -> tuple[float, float]:
    """The gradients are read and written."""
    qkv = inputs["qkv"]
    return float(qkv.numel()), 2.0 * qkv.nbytes


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    for compute in dict.fromkeys(tune.PRECISIONS[precision][0] for precision in scope.precisions):
        case = _case(str(size), size.model, size.batch, size.patches + 1, "mixed")
        yield Measurement(
            f"split_heads {size}, {str(compute).removeprefix('torch.')}", {tuning.TRAINING: case}, compute
        )


def _problem(mode: str, inputs: SplitHeadsInputs) -> tuning.Problem:
    qkv, bias = inputs["qkv"], inputs["bias"]
    return tuning.Problem("split_heads", mode, qkv.dtype, bias.dtype, qkv.dtype, (qkv.shape[-1],), False)


TUNED = Tuned(_measurements, _problem)
