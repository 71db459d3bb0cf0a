"""The binding of the blocks' other ops, as test_binding.py holds those there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from tests.cuda.test_binding import BF16, BOUND, F32, FLOATS, LAYOUTS, relative, sliced

GELU, SILU = (0, 0.0, 0.0), (2, 1.0, 0.0)  # as fastvit/cpu/bias_act.py numbers them
FORMS = {"plain": (False, None), "two products": (True, None), "gate first": (False, False), "gate last": (False, True)}


# bias_act


def act_arguments(form: str = "plain", *shape: int, **changes: Any) -> dict[str, Any]:
    """Of `bias_act_cuda`, in its order: everything that it can be given."""
    has_up, gate_last = FORMS[form]
    shape = shape or (2, 5, 16)
    up, up_bias = (torch.randn(shape), torch.randn(shape[-1])) if has_up else (None, None)
    vectors = {"x": torch.randn(shape), "bias": torch.randn(shape[-1]), "up": up, "up_bias": up_bias}
    function = dict(zip(("function", "linear", "cubic"), GELU, strict=True))
    return {**vectors, **function, "gate_last": gate_last, "dtype": F32, **changes}


def act_in_float64(arguments: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The result; and its gradients, where its own is its double, of x, up, bias and up_bias, those that are there."""
    names = ("x", "up", "bias", "up_bias")
    leaves = {name: arguments[name].double().requires_grad_() for name in names if arguments[name] is not None}
    x = leaves["x"] + leaves.get("bias", 0)
    factor: Any = leaves["up"] + leaves.get("up_bias", 0) if "up" in leaves else 1
    if arguments["gate_last"] is not None:
        x, factor = x.chunk(2, -1)[:: -1 if arguments["gate_last"] else 1]
    out = (gelu if arguments["function"] == 0 else silu)(x) * factor
    return out, list(torch.autograd.grad(out, list(leaves.values()), 2 * out))


def check_bias_act(ops: Any, arguments: dict[str, Any], bound: float, layout: Callable = Tensor.contiguous) -> None:
    """Result and gradients against float64."""
    given = {n: layout(v) if isinstance(v, Tensor) and v.dim() > 1 else v for n, v in arguments.items()}
    out = ops.bias_act_cuda(*given.values())
    expected, gradients = act_in_float64(arguments)
    assert out.dtype == arguments["dtype"] and out.is_contiguous() and relative(out, expected) < bound
    d_x, d_up, sums = ops.bias_act_backward_cuda(layout(2 * out), *list(given.values())[:-1])
    x, bias, up, up_bias = list(arguments.values())[:4]
    assert d_x.dtype == x.dtype and sums.dtype == F32 and (up is not None or d_up.shape == (0,))
    of_x, of_up = sums[: x.shape[-1]], sums[x.shape[-1] :]
    found = [d_x, *([] if up is None else [d_up]), *([] if bias is None else [of_x])]
    found += [] if up_bias is None else [of_up]
    for tensor, truth in zip(found, gradients, strict=True):
        assert relative(tensor, truth) < bound


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("form", FORMS)
def test_bias_act_takes_any_layout(ops: Any, form: str, layout: Callable) -> None:
    check_bias_act(ops, act_arguments(form, bias=sliced(torch.randn(16))), BOUND[F32], layout)


@pytest.mark.parametrize("shape", [(16,), (3, 10), (2, 3, 2, 2, 16), (1, 1, 1040)])
@pytest.mark.parametrize("form", FORMS)
def test_bias_act_of_any_dimensions(ops: Any, form: str, shape: tuple[int, ...]) -> None:
    function = dict(zip(("function", "linear", "cubic"), SILU, strict=True))
    check_bias_act(ops, act_arguments(form, *shape, **function), BOUND[F32])


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_act_takes_a_dtype_each(ops: Any, dtype: torch.dtype) -> None:
    for out, bias, up_bias in zip(FLOATS, FLOATS[1:] + FLOATS[:1], FLOATS[2:] + FLOATS[:2], strict=True):
        arguments = act_arguments("two products", dtype=out)
        for name, of in (("x", dtype), ("up", dtype), ("bias", bias), ("up_bias", up_bias)):
            arguments[name] = arguments[name].to(of)
        check_bias_act(ops, arguments, BOUND[BF16])


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_there_with_a_bias_alone(ops: Any, form: str) -> None:
    arguments = act_arguments(form, bias=None)
    out = ops.bias_act_cuda(*arguments.values())
    sums = ops.bias_act_backward_cuda(out, *list(arguments.values())[:-1])[2]
    assert sums.shape == ((32,) if form == "two products" else (0,))
    arguments["up_bias"] = None
    check_bias_act(ops, arguments, BOUND[F32])


@pytest.mark.parametrize("form", FORMS)
def test_bias_act_of_nothing(ops: Any, form: str) -> None:
    arguments = act_arguments(form, 0, 5, 16, dtype=BF16)
    out = ops.bias_act_cuda(*arguments.values())
    assert out.shape == (0, 5, 8 if form.startswith("gate") else 16) and out.dtype == BF16
    d_x, _, sums = ops.bias_act_backward_cuda(out, *list(arguments.values())[:-1])
    assert d_x.shape == (0, 5, 16) and torch.equal(sums, torch.zeros(32 if form == "two products" else 16))


# split_heads


def heads_in_float64(three: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The packed gradient, and its sums over batch and tokens."""
    packed = torch.stack([part.double() for part in three]).permute(1, 3, 0, 2, 4).flatten(2)
    return packed, packed.sum((0, 1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [*LAYOUTS, lambda part: part.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize("width", [5, 8])
def test_split_heads_backward_takes_any_layout(ops: Any, width: int, layout: Callable, dtype: torch.dtype) -> None:
    three = [torch.randn(2, 3, 4, width).to(dtype) for _ in range(3)]
    d_qkv, sums = ops.split_heads_backward_cuda(layout(three[0]), three[1], layout(three[2]), True)
    packed, truth = heads_in_float64(three)
    assert d_qkv.dtype == dtype and d_qkv.is_contiguous() and torch.equal(d_qkv.double(), packed)
    assert sums.dtype == F32 and relative(sums, truth) < BOUND[F32]
    assert torch.equal(ops.split_heads_backward_cuda(*three, False)[0], d_qkv)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 3, 0, 8)])
def test_split_heads_backward_of_nothing(ops: Any, shape: tuple[int, ...]) -> None:
    d_qkv, sums = ops.split_heads_backward_cuda(*(torch.empty(shape, dtype=BF16) for _ in range(3)), True)
    assert d_qkv.shape == (shape[0], shape[2], 72) and d_qkv.dtype == BF16 and torch.equal(sums, torch.zeros(72))
    assert ops.split_heads_backward_cuda(*(torch.empty(shape) for _ in range(3)), False)[1].shape == (0,)


# Messages: the argument, its value and what is accepted


def call_bias_act(ops: Any, form: str = "two products", **changes: Any) -> Tensor:
    return ops.bias_act_cuda(*act_arguments(form, **changes).values())


def call_bias_act_backward(ops: Any, **changes: Any) -> Any:
    arguments = {"d_out": torch.randn(2, 5, 16), **act_arguments("two products")} | changes
    del arguments["dtype"]
    return ops.bias_act_backward_cuda(*arguments.values())


def call_split_heads(ops: Any, **changes: Any) -> Any:
    three = {name: torch.randn(2, 3, 4, 8) for name in ("d_q", "d_k", "d_v")}
    return ops.split_heads_backward_cuda(*({**three, "has_bias": True} | changes).values())


BAD: Sequence[tuple[Callable, dict[str, Any], str]] = (
    (call_bias_act, {"x": torch.zeros(())}, "x: expected dimensions [..., D], got none"),
    (
        call_bias_act,
        {"x": torch.zeros(2, 16).double()},
        "x: dtype Double is not supported; accepted: Float, Half, BFloa",
    ),
    (call_bias_act, {"x": torch.zeros(2, 65537)}, "x: expected [..., D] with D from 1 to 65536, got rows [2, 65537]"),
    (
        call_bias_act,
        {"x": torch.zeros(2, 15), "gate_last": True},
        "x: with gate_last its last size is halved; got rows",
    ),
    (call_bias_act, {"bias": torch.zeros(15)}, "bias: expected [16], got [15]"),
    (call_bias_act, {"up": torch.zeros(2, 4, 16)}, "up: expected rows [10, 16] as x, got [8, 16]"),
    (call_bias_act, {"up": torch.zeros(2, 5, 16).half()}, "up: dtype Half, but x has Float; they must match"),
    (call_bias_act, {"gate_last": False}, "up: with gate_last it is half of x, not a tensor of its own"),
    (call_bias_act, {"up": None}, "up_bias: it belongs to up, and there is none"),
    (call_bias_act, {"up_bias": torch.zeros(1, 16)}, "up_bias: expected 1 dimensions [D], got 2"),
    (call_bias_act, {"function": 3}, "function: 3; accepted: 0 to 2"),
    (call_bias_act, {"dtype": torch.int32}, "dtype: dtype Int is not supported"),
    (call_bias_act_backward, {"d_out": torch.zeros(9, 16)}, "d_out: expected rows [10, 16] as the result, got [9, 16]"),
    (call_split_heads, {"d_q": torch.zeros(2, 4, 24)}, "d_q: expected 4 dimensions [B, H, T, D/H], got 3"),
    (call_split_heads, {"d_q": torch.zeros(2, 3, 4, 8).double()}, "d_q: dtype Double is not supported; accepted: Flo"),
    (
        call_split_heads,
        {"d_k": torch.zeros(2, 3, 8, 4)},
        "d_k: shape [2, 3, 8, 4], but d_q has [2, 3, 4, 8]; they must",
    ),
    (call_split_heads, {"d_v": torch.zeros(2, 3, 4, 8).half()}, "d_v: dtype Half, but d_q has Float; they must match"),
    (
        call_split_heads,
        dict.fromkeys(("d_q", "d_k", "d_v"), torch.zeros(2, 3, 4, 0)),
        "d_q: expected [B, H, T, D/H] with heads of some width, got [2, 3, 4, 0]",
    ),
    (
        call_split_heads,
        dict.fromkeys(("d_q", "d_k", "d_v"), torch.zeros(()).expand(2**30, 1, 1, 8)),
        "d_q: 1073741824 x 1 rows; they must be < 2^30",
    ),
)


@pytest.mark.parametrize(("call", "changes", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_argument_is_named(ops: Any, call: Callable, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        call(ops, **changes)
    call(ops)  # and with nothing changed there is no error
