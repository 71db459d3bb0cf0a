"""Self-attention between its two products on a CPU, against PyTorch's own and the stack and sum of its gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvit import tuning
from fastvit.benchmarks import tune
from fastvit.benchmarks.contenders import Task, against
from fastvit.benchmarks.problem import FORWARD, WIDTHS, Plan, Problem
from fastvit.benchmarks.rivals import BiasOfProduct, Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.validation import AttentionCase, AttentionInputs, make_inputs
from fastvit.validation.ops.attention import plain

HEAD = 64
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite; none on a GPU, where attention is PyTorch's own."""
    if device.type == "cuda":
        return []
    if size == "tiny":
        shapes = [("Ti", 1, 4)]
    else:
        shapes = [(model, batch, 197) for model in ("Ti", "S") for batch in ((8,) if size == "small" else (1, 8, 16))]
        shapes += [] if size == "small" else [("S", 1, 577), ("B", 8, 197)]
    return [
        (
            f"attention ViT-{model}, {tokens} tokens, batch {batch}, {precision}",
            functools.partial(_problems_of, model, batch, tokens, precision, device, size == "full"),
        )
        for model, batch, tokens in shapes
        for precision in PRECISIONS
    ]


def _problems_of(
    model: str, batch: int, tokens: int, precision: str, device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    name = f"ViT-{model}, {tokens} tokens, batch {batch}"
    case = _case(name, model, batch, tokens)
    task = Task("attention", make_inputs(case, PRECISIONS[precision], device), device)
    contenders = against("scaled_dot_product_attention", _eager, with_compiled)
    return task.problems("attention", name, precision, "packed", contenders, _work)


def _case(name: str, model: str, batch: int, tokens: int) -> AttentionCase:
    return AttentionCase(name, batch=batch, tokens=tokens, heads=max(1, WIDTHS[model] // HEAD), width=HEAD)


def _eager(inputs: AttentionInputs) -> Solution:
    qkv, bias = leaves = [inputs[name] for name in ("qkv", "bias")]

    def run() -> Tensor:
        return plain(inputs, {"qkv": BiasOfProduct.apply(qkv, bias), "bias": None})

    return Solution(run, leaves)


def _work(inputs: AttentionInputs, mode: str) -> tuple[float, float]:
    """Two products, of the backward five; qkv is read, and its gradient written."""
    qkv, tokens = inputs["qkv"], inputs.grad.shape[1]
    products = 2.0 * inputs.grad.numel() * tokens
    read = qkv.numel() + inputs.grad.numel()
    return (2 if mode == FORWARD else 7) * products, float(read * qkv.element_size() * (1 if mode == FORWARD else 3))


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    case = _case(str(size), size.model, size.batch, size.patches + 1)
    for compute in dict.fromkeys(tune.PRECISIONS[precision][0] for precision in scope.precisions):
        title = f"attention {size}, {str(compute).removeprefix('torch.')}"
        yield Measurement(title, dict.fromkeys((tuning.FORWARD, tuning.TRAINING), case), compute)


def _problem(mode: str, inputs: AttentionInputs) -> tuning.Problem:
    qkv, bias = inputs["qkv"], inputs["bias"]
    return tuning.Problem("attention", mode, qkv.dtype, bias.dtype, qkv.dtype, (qkv.shape[-1],), False)


TUNED = Tuned(_measurements, _problem)
