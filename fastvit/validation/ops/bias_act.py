"""`bias_act` as the validator knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.validation import faults
from fastvit.validation.cases import Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors


@dataclass
class BiasActInputs(Inputs):
    """The tensors x, bias, up and up_bias, and what else a call takes."""

    act: str = "gelu"
    gate_last: bool | None = None


@dataclass(frozen=True)
class BiasActCase(Case[BiasActInputs]):
    """One input of `bias_act`, all but the dtype of products and result. `width` is the result's."""

    tokens: int = 9
    layout: str = "contiguous"  # contiguous, sliced_batch, sliced_rows, transposed
    act: str = "gelu"
    bias: bool = True
    up: bool = False
    gate_last: bool | None = None

    def make(self, draw: Draw) -> BiasActInputs:
        features = self.width if self.gate_last is None else 2 * self.width
        dtype = self.table_dtype(draw.compute)
        shape = (self.batch, self.tokens)
        return BiasActInputs(
            tensors={
                "x": draw.laid_out((*shape, features), self.layout),
                "bias": draw.normal(features, dtype=dtype) if self.bias else None,
                "up": draw.laid_out((*shape, self.width), self.layout) if self.up else None,
                "up_bias": draw.normal(self.width, dtype=dtype) if self.up and self.bias else None,
            },
            grad=draw.normal(*shape, self.width, dtype=self.dtype or draw.compute),
            compute=draw.compute,
            dtype=self.dtype,
            act=self.act,
            gate_last=self.gate_last,
        )


_ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def plain(inputs: BiasActInputs, tensors: Tensors) -> Tensor:
    """The eager MLP: a linear layer's bias, in the layer's dtype, the function, and the product with the other half."""
    x, up = _with_bias(tensors["x"], tensors["bias"]), tensors["up"]
    assert x is not None
    if inputs.gate_last is not None:
        first, second = x.chunk(2, -1)
        x, up = (second, first) if inputs.gate_last else (first, second)
    out = _ACTS[inputs.act](x)
    up = _with_bias(up, tensors["up_bias"])
    return (out if up is None else out * up).to(inputs.out)


def _with_bias(product: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return product if product is None or bias is None else product + bias.to(product.dtype)


def _other_half_activated(run: Run, arguments: Arguments) -> Tensor:
    gate_last = arguments["gate_last"]
    return run({**arguments, "gate_last": None if gate_last is None else not gate_last})


def _another_gelu(run: Run, arguments: Arguments) -> Tensor:
    return run({**arguments, "act": "quick_gelu" if arguments["act"] == "gelu" else arguments["act"]})


def _slope_without_bias(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    d_x, d_up, sums = run(arguments)
    return run({**arguments, "bias": None})[0], d_up, sums


def _one_row_missing(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    d_x, d_up, sums = run(arguments)
    if sums.numel():
        sums = sums.clone()
        sums[: d_x.shape[-1]] -= d_x.flatten(0, -2)[-1].float()
    return d_x, d_up, sums


def _up_without_its_factor(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    d_x, d_up, sums = run(arguments)
    return d_x, arguments["d_out"].to(d_up.dtype) if d_up.numel() else d_up, sums


_A = BiasActCase
OP = Op(
    tiny=(
        _A("GELU, under autocast", parameters="mixed"),
        _A("SwiGLU, two products", act="silu", up=True, parameters="mixed", width=72),
        _A("SwiGLU, packed", act="silu", gate_last=False, parameters="mixed", width=136),
        _A("GEGLU, packed, gate last", act="gelu", gate_last=True, width=8),
        _A("one dtype, width 63", width=63),
        _A("GELU by tanh", act="gelu_tanh", parameters="mixed", width=264),
        _A("quick GELU", act="quick_gelu", width=96),
        _A("ReLU", act="relu", parameters="mixed"),
        _A("SiLU, no bias", act="silu", bias=False),
        _A("SwiGLU, packed, no bias, width 17", act="silu", gate_last=False, bias=False, width=17),
        _A("ReGLU, two products, no bias", act="relu", up=True, bias=False),
        _A("GEGLU by tanh, two products, width 193", act="gelu_tanh", up=True, width=193),
        _A("quick GELU, packed, gate last", act="quick_gelu", gate_last=True, parameters="mixed", width=128),
        _A("fp32 result", out="float32", parameters="mixed"),
        _A("fp32 result, packed", out="float32", act="silu", gate_last=False),
        _A("width 1", tokens=40, width=1),
        _A("width 1048", width=1048, tokens=3, parameters="mixed"),
        _A("sliced batch", layout="sliced_batch", width=80, up=True, act="silu"),
        _A("sliced rows", layout="sliced_rows", gate_last=False, act="silu"),
        _A("turned", layout="transposed", width=96),
        _A("many rows", batch=7, tokens=41, width=16, parameters="mixed"),
        _A("many rows, packed", batch=7, tokens=41, width=16, gate_last=True, parameters="mixed"),
        _A("one token", batch=1, tokens=1, width=384, parameters="mixed"),
        _A("empty batch", batch=0, up=True),
    ),
    large=(
        _A("ViT-S, batch 8", batch=8, tokens=197, width=1536, parameters="mixed"),
        _A("SwiGLU of DINOv2-g", batch=2, tokens=257, width=4096, act="silu", gate_last=False, parameters="mixed"),
        _A("50,432 rows", batch=256, tokens=197, width=64, parameters="mixed"),
    ),
    quick=3,
    plain=plain,
    faults=(
        Fault("bias_act: bias dropped", "forward", forward=faults.bias_dropped),
        Fault("bias_act: last column wrong", "forward", forward=faults.last_column_wrong),
        Fault("bias_act: the other half activated", "forward", forward=_other_half_activated),
        Fault("bias_act: GELU of another kind", "forward", forward=_another_gelu),
        Fault("bias_act: slope taken without the bias", "d_x", backward=_slope_without_bias),
        Fault("bias_act: a row missing from a sum", "d_bias", backward=_one_row_missing),
        Fault("bias_act: up's gradient without its factor", "d_up", backward=_up_without_its_factor),
    ),
)  # fmt: skip
