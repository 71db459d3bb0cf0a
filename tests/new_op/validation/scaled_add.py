"""The toy op as the validator knows it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastvit.validation import Case, Inputs, faults
from fastvit.validation.cases import Draw
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors


@dataclass
class ScaledAddInputs(Inputs):
    factor: float = 0.3


@dataclass(frozen=True)
class ScaledAddCase(Case[ScaledAddInputs]):
    layout: str = "contiguous"

    def make(self, draw: Draw) -> ScaledAddInputs:
        shape = (self.batch, 7, self.width)
        a, b = (draw.laid_out(shape, self.layout) for _ in range(2))
        d_sum, d_difference = (draw.normal(*shape, dtype=draw.compute) for _ in range(2))
        more = {"difference": d_difference}
        return ScaledAddInputs(tensors={"a": a, "b": b}, grad=d_sum, more_grads=more, compute=draw.compute)


def plain(inputs: ScaledAddInputs, tensors: Tensors) -> tuple[Tensor, Tensor]:
    a, b = tensors["a"], tensors["b"]
    assert a is not None and b is not None
    scaled = inputs.factor * b
    return a + scaled, a - scaled


def _only_the_sum_is_right(run: Run, arguments: Arguments) -> tuple[Tensor, Tensor]:
    total, difference = run(arguments)
    return total, faults.last_column_wrong(lambda _: difference, arguments)


def _factor_forgotten(run: Run, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return run({**arguments, "factor": 1.0})


OP = Op(
    tiny=(ScaledAddCase("plain"), ScaledAddCase("turned, width 63", width=63, layout="transposed")),
    large=(ScaledAddCase("large", batch=32, width=1024),),
    quick=1,
    plain=plain,
    faults=(
        Fault("scaled_add: difference wrong", "difference", forward=_only_the_sum_is_right),
        Fault("scaled_add: factor forgotten in backward", "d_b", backward=_factor_forgotten),
    ),
)
