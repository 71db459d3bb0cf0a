"""The ops `fastvit::bias_act` and `fastvit::bias_act_backward`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvit import reference
from fastvit.cpu import bias_act as formulas
from fastvit.ops import registry


class Arguments(NamedTuple):
    """What `fastvit.functional.bias_act` was given, checked and settled."""

    x: Tensor  # [..., F]; [..., 2F] where gate_last is given
    bias: Tensor | None  # as long as a row of x
    up: Tensor | None  # [..., F]
    up_bias: Tensor | None  # [F]
    act: str
    gate_last: bool | None
    dtype: torch.dtype
    backend: str


def _fake(call: Arguments) -> Tensor:
    width = call.x.shape[-1] if call.gate_last is None else call.x.shape[-1] // 2
    return call.x.new_empty((*call.x.shape[:-1], width), dtype=call.dtype)


def _plain(call: Arguments) -> Tensor:
    with registry.without_autocast(call.x.device.type):
        return reference.bias_act(
            call.x,
            call.bias,
            call.act,
            up=call.up,
            up_bias=call.up_bias,
            gate_last=call.gate_last,
            dtype=call.dtype,
        )


bias_act = registry.define("bias_act", Arguments, "Tensor", _fake, plain=_plain)


class BackwardArguments(NamedTuple):
    """The gradient of the result, and the arguments."""

    d_out: Tensor  # [..., F]
    x: Tensor
    bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    act: str
    gate_last: bool | None
    backend: str


def _backward_fake(call: BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Of x; of up (size 0 without); and the float32 sums over rows of both (size 0 without a bias)."""
    x, up = call.x, call.up
    has_bias = call.bias is not None or call.up_bias is not None
    sums = x.shape[-1] * (1 if up is None else 2)
    return (
        x.new_empty(x.shape),
        x.new_empty((0,) if up is None else up.shape),
        x.new_empty((sums if has_bias else 0,), dtype=torch.float32),
    )


bias_act_backward = registry.define("bias_act_backward", BackwardArguments, "(Tensor, Tensor, Tensor)", _backward_fake)


def _save(ctx: Any, call: Arguments, _: Tensor) -> None:
    ctx.save_for_backward(*call[:4])
    ctx.rest = call.act, call.gate_last, call.backend


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, up, up_bias = ctx.saved_tensors
    d_x, d_up, sums = bias_act_backward(d_out, x, bias, up, up_bias, *ctx.rest)
    d_bias = None if bias is None else sums[: x.shape[-1]].to(bias.dtype)
    d_up_bias = None if up_bias is None else sums[x.shape[-1] :].to(up_bias.dtype)
    return d_x, d_bias, None if up is None else d_up, d_up_bias


registry.differentiate(bias_act, Arguments, _save, _gradients)


def _save_backward(ctx: Any, call: BackwardArguments, _: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*call[:5])
    ctx.rest = call.act, call.gate_last


def _second_gradients(ctx: Any, *changes: Tensor | None) -> tuple[Tensor | None, ...]:
    return registry.derivatives(ctx, lambda *given: formulas.gradients(*given, *ctx.rest), changes)


registry.differentiate(bias_act_backward, BackwardArguments, _save_backward, _second_gradients)
