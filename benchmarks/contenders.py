"""How an op takes part in a suite: its problems, our backends and the rivals, each checked before it is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvit import functional
from fastvit.backend import why_missing
from fastvit.benchmarks.problem import (
    BOTH,
    COMPILED,
    FORWARD,
    WIDTHS,
    Contender,
    Problem,
    Unavailable,
    compiled,
    our_backends,
    usual_batches,
)
from fastvit.benchmarks.rivals import Solution, autocast
from fastvit.benchmarks.rows import OURS
from fastvit.benchmarks.timing import Call
from fastvit.validation import Inputs
from fastvit.validation.ops import OPS, arguments, results_of, truth
from fastvit.validation.report import FAILED
from fastvit.validation.runner import backend_candidate, check_inputs
from fastvit.validation.tolerance import relative_error

Make = Callable[[Any], Solution]  # from the inputs of a case
Work = Callable[[Any, str], tuple[float, float]]
"""Arithmetic and unavoidable memory traffic in bytes, of the inputs of a case in a mode."""


class Task:
    """An op on the inputs of one case, whose parameters require gradients: what contenders are made for.

    `check(backend)` says why a backend must not be timed, "" if it may; `yardstick()` is the float64 truth and plain
    PyTorch's error, to see that a rival computes the same thing. Both are found once.
    """

    def __init__(self, op: str, inputs: Inputs, device: torch.device) -> None:
        self.op, self.inputs, self.device = op, trained(inputs), device
        self.check = functools.lru_cache(lambda backend: check_backend(backend, op, inputs, device))
        self.yardstick = functools.lru_cache(lambda: yardstick(op, inputs))

    def problems(
        self,
        suite: str,
        shape: str,
        precision: str,
        layout: str,
        contenders: Callable[[Task, str], Iterator[Contender]],
        work: Work | None = None,
        modes: Sequence[str] = (FORWARD, BOTH),
    ) -> Iterator[Problem]:
        """The case as a problem of a suite in each mode; without `work` it has no floor."""
        for mode in modes:
            flops, moved = work(self.inputs, mode) if work else (0.0, 0.0)
            everybody, batch = list(contenders(self, mode)), self.inputs.grad.shape[0]
            case = (suite, shape, precision, layout, mode)
            yield Problem(*case, everybody, self.check, self.inputs.compute, batch=batch, flops=flops, moved=moved)

    def ours(self, mode: str, make: Callable[[str], Make] | None = None) -> Iterator[Contender]:
        """Every backend that runs at full speed; `make` says how, given one, where it is not the op's own call."""
        for backend in our_backends(self.device):
            solve = make(backend) if make else functools.partial(ours, self.op, backend=backend)
            yield Contender(f"{OURS}{backend}", functools.partial(self._build, solve, mode))

    def rival(
        self, mode: str, name: str, setting: str, make: Make, compile_settings: Sequence[str] = ()
    ) -> Iterator[Contender]:
        """A rival in one setting, eager and compiled as asked for. It must compute the same as we do."""
        for how in ("", *compile_settings):
            build = functools.partial(self._build_checked, make, mode, how)
            yield Contender(name, build, f"{setting} {how}".strip())

    def _build(self, make: Make, mode: str) -> Call:
        return timed_call(make(self.inputs), self.inputs.grads.values(), mode)

    def _build_checked(self, make: Make, mode: str, how: str) -> Call:
        solution = make(self.inputs)
        exact, plain_error = self.yardstick()
        with torch.no_grad():
            error = largest_error(solution.tokens(), exact)
        if error > 3 * plain_error + 4 * torch.finfo(torch.float32).eps:
            raise Unavailable(f"does not compute the same: error {error:.3g}, plain PyTorch's {plain_error:.3g}")
        tokens = solution.tokens
        if how:
            with torch.set_grad_enabled(mode == BOTH):
                tokens = compiled(tokens, self.device, how)
        return timed_call(Solution(tokens, solution.parameters), self.inputs.grads.values(), mode)


def token_shapes(size: str, device: torch.device, tokens: int) -> list[tuple[str, int, int]]:
    """Model, batch and tokens of the cases of an op that is given tokens; of size small or full."""
    models = ("S", "B") if size == "small" else tuple(WIDTHS)
    return [(model, batch, tokens) for model in models for batch in usual_batches(size, device.type == "cuda")]


def against(rival: str, make: Make, with_compiled: bool) -> Callable[[Task, str], Iterator[Contender]]:
    """The contenders of a suite that has one rival: it is compiled too if asked for."""

    def contenders(task: Task, mode: str) -> Iterator[Contender]:
        yield from task.ours(mode)
        yield from task.rival(mode, rival, "", make, (COMPILED,) if with_compiled else ())

    return contenders


def trained(inputs: Inputs) -> Any:
    """The inputs with tensors of their own, of which those that are trained require gradients."""
    names = set(inputs.differentiable()) - set(inputs.data)
    return replace(inputs, tensors=inputs.tensors | {name: inputs[name].detach().requires_grad_() for name in names})


def ours(op: str, inputs: Inputs, backend: str) -> Solution:
    """The one call."""
    positional, named = arguments(op, inputs, inputs.tensors)
    function = functools.partial(getattr(functional, op), *positional, **named, backend=backend)

    def tokens() -> Tensor:
        with autocast(inputs):
            return function()

    leaves = [tensor for tensor in inputs.tensors.values() if tensor is not None and tensor.requires_grad]
    return Solution(tokens, leaves)


def timed_call(solution: Solution, grads: Iterable[Tensor], mode: str) -> Call:
    """What is timed: the tokens alone, or the tokens and the gradients of all parameters."""

    def forward() -> object:
        with torch.no_grad():
            return solution.tokens()

    def forward_and_backward() -> object:
        outs = results_of(solution.tokens())
        upstream = [grad.to(out.dtype) for grad, out in zip(grads, outs, strict=True)]
        return torch.autograd.grad(outs, solution.parameters, upstream)

    return forward if mode == FORWARD else forward_and_backward


def yardstick(op: str, inputs: Inputs) -> tuple[Any, float]:
    """The float64 truth, and plain PyTorch's error."""
    with torch.no_grad():
        wide = inputs.tensors | {name: inputs[name].double() for name in inputs.differentiable()}
        exact = truth(op, inputs, wide)
        return exact, largest_error(OPS[op].plain(inputs, inputs.tensors), exact)


def largest_error(outputs: Any, exact: Any) -> float:
    """Of the results of a call, relative to the truth."""
    return max(relative_error(*pair) for pair in zip(results_of(outputs), results_of(exact), strict=True))


def check_backend(backend: str, op: str, inputs: Inputs, device: torch.device) -> str:
    """Why a backend must not be timed on these inputs: what of its own output and gradients is out of tolerance."""
    if reason := why_missing(backend, op):
        return reason
    rows = check_inputs(backend_candidate(backend, device), op, inputs)
    wrong = [row for row in rows if row.status == FAILED]
    if not wrong:
        return ""
    found = [f"{r.quantity}: {r.reason or f'error {r.error:.3g} > {r.bound:.3g} ({r.where})'}" for r in wrong]
    return "not timed, out of tolerance: " + "; ".join(found)
