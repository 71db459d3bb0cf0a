"""The tolerance rule, the same for every test and every backend.

Truth is the reference in float64 on the same, already rounded inputs. A result passes when its relative error
‖out − truth‖ / ‖truth‖ is at most twice that of plain PyTorch at the same precision, plus a floor of four eps for
float32 results and none for others. The same bound holds for the worst slice along every axis (sample, token
position, column, weight row, pixel row, ...) and for the worst single token row, each against plain PyTorch's worst:
a norm over the whole tensor would hide one wrong patch.

The precision is what torch allows: with TF32 allowed for convolutions, as it is by default, float32 on a GPU is held
to operands rounded to TF32 (see `plain.tf32_conv2d`), and the report says so; without, to float32's own.

A slice's error is taken relative to its own norm, but at least to the root mean square norm of all slices of its
kind, so that a slice that happens to be nearly zero does not decide the outcome. There is no absolute tolerance.

A handful of values is no yardstick: plain PyTorch may be exact there by luck. FEW_VALUES says what a handful is; the
runner settles such cases on more draws of them, by the same rule (see `runner.check_case`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FACTOR = 2.0  # how much worse than plain PyTorch a result may be
FLOOR_EPS = 4.0  # for float32 results, in eps
FEW_VALUES = 256

AXES = {
    1: ("value",),
    2: ("row", "column"),
    3: ("sample", "position", "column"),
    4: ("row", "channel", "pixel row", "pixel column"),
}


@dataclass(frozen=True)
class Comparison:
    """Outcome for one tensor. `error` and `bound` are those of the check that came closest to failing."""

    name: str
    passed: bool
    error: float
    bound: float
    where: str  # "all values" or the kind and index of a slice
    message: str = ""

    def __str__(self) -> str:
        if self.message:
            return f"{self.name}: {self.message}"
        verdict = "within" if self.passed else "over"
        return f"{self.name}: error {self.error:.3g} is {verdict} the bound {self.bound:.3g} ({self.where})"


def compare(out: Tensor, plain: Tensor, truth: Tensor, name: str = "result") -> Comparison:
    """Hold a result to the rule.

    Args:
        out: the result under test, any float dtype. NaN and infinity fail.
        plain: what plain PyTorch computes at the same precision, same shape; its dtype decides no more than its error.
        truth: float64, same shape.
        name: for the message.
    """
    if out.shape != truth.shape or plain.shape != truth.shape:
        shapes = f"{list(out.shape)}, plain PyTorch's {list(plain.shape)}, the truth's {list(truth.shape)}"
        return Comparison(name, False, float("inf"), 0.0, "shape", f"shapes differ: the result's is {shapes}")
    if truth.numel() == 0:
        return Comparison(name, True, 0.0, 0.0, "no values")
    if not bool(torch.isfinite(plain).all()):
        return Comparison(name, False, float("inf"), 0.0, "yardstick", "plain PyTorch's own result is not finite here")
    floor = FLOOR_EPS * torch.finfo(torch.float32).eps if out.dtype is torch.float32 else 0.0
    with torch.no_grad():
        truth = truth.detach().to(torch.float64)
        ours, theirs = (_slice_errors(result.detach().to(truth), truth) for result in (out, plain))
    checks = []
    for kind, errors in ours.items():
        worst = int(errors.argmax())  # NaN counts as largest
        error = float(errors.reshape(-1)[worst])
        bound = FACTOR * float(theirs[kind].max()) + floor
        place = tuple(map(int, np.unravel_index(worst, errors.shape)))
        where = kind if errors.numel() == 1 else f"worst {kind}: {place if len(place) > 1 else place[0]}"
        checks.append(Comparison(name, error <= bound, error, bound, where))  # NaN does not pass
    return max(checks, key=lambda check: strain(check.error, check.bound))


def assert_close(out: Tensor, plain: Tensor, truth: Tensor, name: str = "result") -> None:
    """`compare`, as an assertion for tests."""
    comparison = compare(out, plain, truth, name)
    assert comparison.passed, str(comparison)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """‖out − truth‖ / ‖truth‖ in float64; 0 for empty tensors, infinity where only the truth is zero."""
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().to(torch.float64)
    return float(_slice_errors(out.detach().to(truth), truth)["all values"])


def strain(error: float, bound: float) -> float:
    """How close to failing: error over bound; an exact result at a bound of zero is not close at all."""
    if error == 0.0:
        return 0.0
    return error / bound if bound > 0.0 else float("inf")


def _slice_errors(result: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Relative error of every slice of every kind, and of the whole."""
    # Non-finite results have no norm to speak of; they count as infinitely wrong.
    difference = (result - truth).square().nan_to_num(nan=float("inf"), posinf=float("inf"))
    squared = truth.square()
    errors = {"all values": _ratio(difference.sum()[None], squared.sum()[None])}
    dims = truth.dim()
    if dims < 2:
        return errors
    for axis, kind in enumerate(AXES.get(dims, tuple(f"axis {i}" for i in range(dims)))):
        others = [dim for dim in range(dims) if dim != axis]
        errors[kind] = _ratio(difference.sum(others), squared.sum(others))
    if dims == 3:
        errors["token"] = _ratio(difference.sum(-1), squared.sum(-1))
    return errors


def _ratio(difference: Tensor, squared: Tensor) -> Tensor:
    scale = torch.maximum(squared, squared.mean())
    exact = difference == 0  # 0/0: the truth is zero and so is the result
    return torch.where(exact, 0.0, (difference / scale).sqrt())
