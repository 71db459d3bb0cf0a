"""The ops as the validator knows them: a file for each, of its name, that holds its cases, plain PyTorch and faults.

What is the same for every op is here: its arguments are the tensors and the fields of a case's inputs that have their
names, and its truth is the function of its name in `fastvit.reference`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastvit import functional, reference
from fastvit.discovery import Declared

if TYPE_CHECKING:
    from fastvit.validation.cases import Case, Inputs
    from fastvit.validation.faults import Fault

Tensors = dict[str, Tensor | None]
Outputs = Any  # of a call: a tensor, or a tuple of them where the op has several results


@dataclass(frozen=True)
class Op:
    """What the file of an op declares, as `OP`.

    `plain` is what a user writes today, at the precision under test: its error is the yardstick of the tolerance. It
    is called as plain(inputs, tensors), with tf32=True too where the op `multiplies` and its products are to be made
    at TF32 precision.
    """

    tiny: tuple[Case, ...]  # small enough for an interpreter that runs a GPU kernel program by program
    large: tuple[Case, ...]  # real sizes, for backends that run at full speed
    quick: int  # how many of the tiny ones come first because they find most
    plain: Callable[..., Outputs]
    faults: tuple[Fault, ...] = ()  # what the validator must catch
    multiplies: bool = False
    views: bool = False  # its results are views, for which no backend launches anything


OPS: Mapping[str, Op] = Declared(__name__, "OP")


def heaviest_first() -> list[str]:
    """The ops, those that multiply first: the order in which to go through them where time may run out."""
    return sorted(OPS, key=lambda op: not OPS[op].multiplies)


def arguments(op: str, inputs: Inputs, tensors: Tensors) -> tuple[list[Any], dict[str, Any]]:
    """The call of an op on `tensors` (those of `inputs`, perhaps as leaves), positional and by name; without
    `backend`."""
    parameters = dict(inspect.signature(getattr(functional, op)).parameters)
    del parameters["backend"]
    values = {name: _value(name, inputs, tensors) for name in parameters}
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    return [values.pop(name) for name in names], values


def _value(name: str, inputs: Inputs, tensors: Tensors) -> Any:
    if name in tensors:
        return tensors[name]
    return getattr(inputs, name) if hasattr(inputs, name) else tensors_of(name, tensors)


def tensors_of(name: str, tensors: Tensors) -> list[Tensor]:
    """What an argument that is a list has, in a case's tensors "name[0]", "name[1]", ...; or the one of this name."""
    return [tensor for key, tensor in tensors.items() if key.partition("[")[0] == name and tensor is not None]


def call(function: Callable[..., Outputs], op: str, inputs: Inputs, tensors: Tensors, **more: Any) -> Outputs:
    """A function that is called like the op."""
    positional, named = arguments(op, inputs, tensors)
    return function(*positional, **named, **more)


def results_of(outputs: Outputs) -> tuple[Tensor, ...]:
    """The results of a call that have gradients, however many."""
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(result for result in results if result.is_floating_point())


def truth(op: str, inputs: Inputs, tensors: Tensors) -> Outputs:
    """The reference on float64 copies of the tensors."""
    return call(getattr(reference, op), op, inputs.exact(), tensors)
