"""The benchmark of the toy op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastvit import tuning
from fastvit.benchmarks.contenders import Task, against
from fastvit.benchmarks.problem import Plan
from fastvit.benchmarks.rivals import Solution
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.validation import Inputs, make_inputs
from fastvit.validation.ops import OPS


def plan(size: str, device: torch.device) -> Plan:
    (case,) = OPS["scaled_add"].large
    task = Task("scaled_add", make_inputs(case, torch.float32, device), device)
    contenders = against("torch.add", _eager, with_compiled=False)
    return [("scaled_add", lambda: task.problems("scaled_add", case.name, "float32", case.layout, contenders))]


def _eager(inputs: Inputs) -> Solution:
    a, b = leaves = [inputs["a"], inputs["b"]]
    return Solution(lambda: (a.add(b, alpha=0.3), a.sub(b, alpha=0.3)), leaves)


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    cases = dict.fromkeys((tuning.FORWARD, tuning.TRAINING), OPS["scaled_add"].tiny[0])
    yield Measurement(f"scaled_add {size}", cases, torch.float32)


def _problem(mode: str, inputs: Inputs) -> tuning.Problem:
    dtype = inputs.compute
    return tuning.Problem("scaled_add", mode, dtype, dtype, dtype, (inputs.grad.shape[-1],), False)


TUNED = Tuned(_measurements, _problem)
