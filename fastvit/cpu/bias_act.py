"""`bias_act` by PyTorch's own ops, on any device: on a CPU the fast ones, elsewhere for what has no kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_QUICK = 1.702
_ATEN: Any = torch.ops.aten


def _swish(x: Tensor, factor: float) -> Tensor:
    """Of Ramachandran et al., 2017: x · sigmoid(factor · x)."""
    return x * torch.sigmoid(factor * x)


def _swish_backward(grad: Tensor, x: Tensor, factor: float) -> Tensor:
    gate = torch.sigmoid(factor * x)
    return grad * (gate + factor * x * gate * (1 - gate))


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    # PyTorch's own in one pass, which has no derivative.
    is_followed = grad.requires_grad or x.requires_grad
    return _swish_backward(grad, x, 1.0) if is_followed else _ATEN.silu_backward(grad, x)


# How kernels know them, (which, linear, cubic): what is not by erf or relu is x · sigmoid(x · (linear + cubic · x²)).
ERF, RELU, SIGMOID = 0, 1, 2
FUNCTIONS = {
    "gelu": (ERF, 0.0, 0.0),
    "gelu_tanh": (SIGMOID, 2 * (2 / torch.pi) ** 0.5, 2 * (2 / torch.pi) ** 0.5 * 0.044715),
    "quick_gelu": (SIGMOID, _QUICK, 0.0),
    "relu": (RELU, 0.0, 0.0),
    "silu": (SIGMOID, 1.0, 0.0),
}
# The functions of float32, and their gradients: (of the result, at x) → of x.
ACTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, _ATEN.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _ATEN.gelu_backward(grad, x, approximate="tanh"),
    ),
    "quick_gelu": (lambda x: _swish(x, _QUICK), lambda grad, x: _swish_backward(grad, x, _QUICK)),
    "relu": (F.relu, lambda grad, x: _ATEN.threshold_backward(grad, x, 0)),
    "silu": (F.silu, _silu_backward),
}


def operands(
    x: Tensor, bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, gate_last: bool | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What goes through the function and what it is multiplied by, each with its bias: of a packed x, its halves."""
    if gate_last is None:
        return x, bias, up, up_bias
    width = x.shape[-1] // 2
    halves = [(x[..., :width], x[..., width:]), (None, None) if bias is None else (bias[:width], bias[width:])]
    (gate, gate_bias), (up, up_bias) = list(zip(*halves, strict=True))[:: -1 if gate_last else 1]
    return gate, gate_bias, up, up_bias


def forward(
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    gate_last: bool | None,
    dtype: torch.dtype,
) -> Tensor:
    """[..., F]; arguments as in `fastvit.functional.bias_act`, already checked."""
    out = x.new_empty((*x.shape[:-1], x.shape[-1] if gate_last is None else x.shape[-1] // 2), dtype=dtype)
    for out_rows, rows, up_rows in zip(*_pieces(x, out, x, up), strict=False):
        gate, gate_bias, other, other_bias = operands(rows, bias, up_rows, up_bias, gate_last)
        value = ACTS[act][0](_added(gate, gate_bias))
        out_rows.copy_(value if other is None else value * _added(other, other_bias))
    return out


def backward(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    gate_last: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and up (size 0 where there is none), and what the rows of both sum up to in float32, one behind
    the other (size 0 without a bias)."""
    d_x, d_up = x.new_empty(x.shape), x.new_empty((0,) if up is None else up.shape)
    sums = []
    pieces = _pieces(x, d_out, x, up, d_x, None if up is None else d_up)
    for d_out_rows, rows, up_rows, d_rows, d_up_rows in zip(*pieces, strict=False):
        changes = gradients(d_out_rows, rows, bias, up_rows, up_bias, act, gate_last)
        d_rows.copy_(changes[0])
        if d_up_rows is not None:
            d_up_rows.copy_(changes[1])
        sums.append(changes[2])
    return d_x, d_up, torch.stack(sums).sum(0)


def gradients(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    gate_last: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of `backward`, which autograd can follow."""
    gate, gate_bias, other, other_bias = operands(x, bias, up, up_bias, gate_last)
    value, d_out, nothing = _added(gate, gate_bias), d_out.float(), x.new_empty(0)
    if other is None:
        changes = [ACTS[act][1](d_out, value)]
    else:
        changes = [ACTS[act][1](d_out * _added(other, other_bias), value), d_out * ACTS[act][0](value)]
    if gate_last:
        changes.reverse()
    has_bias = bias is not None or up_bias is not None
    sums = torch.cat([_rows(change).sum(0) for change in changes]) if has_bias else value.new_empty(0)
    rounded = [change.to(x.dtype) for change in changes]
    if up is None:
        return rounded[0] if other is None else torch.cat(rounded, -1), nothing, sums
    return rounded[0], rounded[1], sums


PIECE = 2**18  # values a thread, a megabyte of them in float32


def _pieces(x: Tensor, *tensors: Tensor | None) -> Iterator[Iterable[Any]]:
    """Of each tensor's rows as many at a time as make a pass over them one over memory: what lies between the steps
    stays in the caches. On other devices than a CPU, all at once."""
    rows = PIECE * torch.get_num_threads() // x.shape[-1] if x.device.type == "cpu" else x.numel()
    return (repeat(None) if tensor is None else _rows(tensor).split(max(rows, 16)) for tensor in tensors)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _added(product: Tensor, bias: Tensor | None) -> Tensor:
    """In float32."""
    return product.float() if bias is None else product + bias.float()
