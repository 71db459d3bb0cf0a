"""What stands between an MLP's products, plain and gated, against the eager ops behind a linear layer with its bias."""

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
from fastvit.benchmarks.rivals import BiasOfProduct, Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.validation import BiasActCase, Inputs, make_inputs
from fastvit.validation.ops.bias_act import plain

# label → (dtype of the products, dtype of the biases)
PRECISIONS = {"float32": (torch.float32, "same"), "bfloat16": (torch.bfloat16, "same"),
              "bfloat16, fp32 bias": (torch.bfloat16, "mixed")}  # fmt: skip
# label → (act, gate_last, width of the result over the model's); a SwiGLU is given two thirds of an MLP's
MLPS: dict[str, tuple[str, bool | None, float]] = {"GELU": ("gelu", None, 4), "SwiGLU": ("silu", False, 8 / 3)}


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    shapes = [("Ti", 1, 4)] if size == "tiny" else token_shapes(size, device, 197)
    return [
        (
            f"bias_act ViT-{model}, {mlp}, batch {batch}, {precision}",
            functools.partial(_problems_of, model, mlp, batch, tokens, precision, device, size != "tiny"),
        )
        for model, batch, tokens in shapes
        for mlp in MLPS
        for precision in PRECISIONS
    ]


def _case(name: str, model: str, mlp: str, batch: int, tokens: int, parameters: str) -> BiasActCase:
    act, gate_last, ratio = MLPS[mlp]
    width = round(WIDTHS[model] * ratio)
    return BiasActCase(
        name, batch=batch, tokens=tokens, width=width, act=act, gate_last=gate_last, parameters=parameters
    )


def _problems_of(
    model: str, mlp: str, batch: int, tokens: int, precision: str, device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    dtype, parameters = PRECISIONS[precision]
    name = f"ViT-{model}, {mlp}, {tokens} tokens, batch {batch}"
    case = _case(name, model, mlp, batch, tokens, parameters)
    task = Task("bias_act", make_inputs(case, dtype, device), device)
    contenders = against("linear's bias + act", _eager, with_compiled)
    return task.problems("bias_act", name, precision, "contiguous", contenders, _work)


def _eager(inputs: Inputs) -> Solution:
    x, bias = leaves = [inputs[name] for name in ("x", "bias")]
    product = (x + bias.to(x.dtype)).detach().requires_grad_()
    without = {"bias": None, "up": None, "up_bias": None}

    def run() -> Tensor:
        return plain(inputs, {"x": BiasOfProduct.apply(product, bias), **without})  # type: ignore[arg-type]

    return Solution(run, [product, *leaves[1:]])


def _work(inputs: Inputs, mode: str) -> tuple[float, float]:
    """Backward reads the product once more, and writes as much."""
    x, grad = (tensor.nbytes for tensor in (inputs["x"], inputs.grad))
    return 20.0 * inputs.grad.numel(), float(x + grad + (2 * x + grad if mode == BOTH else 0))


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    for compute in dict.fromkeys(tune.PRECISIONS[precision][0] for precision in scope.precisions):
        for mlp in MLPS:
            served = _case(str(size), size.model, mlp, size.batch, size.patches + 1, "same")
            cases = {tuning.FORWARD: served, tuning.TRAINING: replace(served, parameters="mixed")}
            yield Measurement(f"bias_act {size}, {mlp}, {str(compute).removeprefix('torch.')}", cases, compute)


def _problem(mode: str, inputs: Inputs) -> tuning.Problem:
    x, bias = inputs["x"], inputs["bias"]
    is_gated = x.shape[-1] != inputs.grad.shape[-1]
    return tuning.Problem("bias_act", mode, x.dtype, bias.dtype, inputs.out, (x.shape[-1],), is_gated)


TUNED = Tuned(_measurements, _problem)
