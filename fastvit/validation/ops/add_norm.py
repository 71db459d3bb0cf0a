"""`add_norm` as the validator knows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.validation import faults
from fastvit.validation.cases import DTYPES, Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors

EPS = 1e-6


@dataclass
class AddNormInputs(Inputs):
    """The tensors residual, branch, bias, scale, weight and norm_bias, and what else a call takes."""

    keep: Tensor | None = None
    eps: float = EPS
    rms: bool = False
    residual_dtype: torch.dtype | None = None

    def exact(self) -> AddNormInputs:
        return replace(self, dtype=None, residual_dtype=None)


@dataclass(frozen=True)
class AddNormCase(Case[AddNormInputs]):
    """One input of `add_norm`, all but the dtype of branch and result.

    `stream` is "same" or the name of the residual's dtype, `total` the name of the sum's, or None for the default.
    """

    tokens: int = 9
    layout: str = "contiguous"  # contiguous, sliced_batch, sliced_rows, transposed
    stream: str = "same"
    total: str | None = None
    branch: bool = True
    bias: bool = True
    scale: bool = False
    keep: bool = False
    norm_bias: bool = True
    rms: bool = False

    def make(self, draw: Draw) -> AddNormInputs:
        shape, compute = (self.batch, self.tokens, self.width), draw.compute
        stream = compute if self.stream == "same" else DTYPES[self.stream]
        vector_dtype = self.table_dtype(compute)

        def vector(is_there: bool, middle: float = 0.0) -> Tensor | None:
            return (middle + draw.normal(self.width, dtype=torch.float32)).to(vector_dtype) if is_there else None

        tensors = {
            # An offset: what is lost where a mean is subtracted too late, or not at all, shows.
            "residual": (draw.laid_out(shape, self.layout, torch.float32) + 0.5).to(stream),
            "branch": draw.laid_out(shape, self.layout) if self.branch else None,
            "bias": vector(self.branch and self.bias),
            "scale": vector(self.branch and self.scale),
            "weight": vector(True, 1.0),
            "norm_bias": vector(self.norm_bias),
        }
        total = DTYPES[self.total] if self.total else None
        added = [tensor.dtype for name in ("residual", "branch", "scale") if (tensor := tensors[name]) is not None]
        default = stream
        for dtype in added:
            default = torch.promote_types(default, dtype)
        keep = torch.rand(self.batch, generator=draw.generator) < 0.6
        keep[: self.batch // 2 : 2] = True  # one at least of several
        return AddNormInputs(
            tensors=tensors,
            grad=draw.normal(*shape, dtype=total or default),
            more_grads={"normed": draw.normal(*shape, dtype=self.dtype or compute)},
            compute=compute,
            dtype=self.dtype or compute,
            keep=(keep / 0.6).to(draw.device) if self.branch and self.keep else None,
            rms=self.rms,
            residual_dtype=total,
        )


def plain(inputs: AddNormInputs, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The eager block: the linear layer's bias, LayerScale, DropPath, addition and norm, each by itself."""
    total, branch, weight = tensors["residual"], tensors["branch"], tensors["weight"]
    assert total is not None and weight is not None
    if branch is not None:
        if tensors["bias"] is not None:
            branch = branch + tensors["bias"].to(branch.dtype)
        if tensors["scale"] is not None:
            branch = branch * tensors["scale"]
        if inputs.keep is not None:
            branch = branch * inputs.keep.to(branch.dtype)[:, None, None]
        total = (total + branch).to(inputs.out)
    x, norm_bias = total.float(), tensors["norm_bias"]
    norm_bias = None if norm_bias is None else norm_bias.float()
    if inputs.rms:
        normed = F.rms_norm(x, x.shape[-1:], weight.float(), inputs.eps)
        normed = normed if norm_bias is None else normed + norm_bias
    else:
        normed = F.layer_norm(x, x.shape[-1:], weight.float(), norm_bias, inputs.eps)
    return total, normed.to(inputs.more_grads["normed"].dtype)


def _last_column_of_the_norm_wrong(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    total, normed, statistics = run(arguments)
    return total, faults.last_column_wrong(lambda _: normed, arguments), statistics


def _neighbours_factor(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    keep = arguments["keep"]
    return run({**arguments, "keep": None if keep is None else keep.roll(1) + 0.5})


def _stream_gradient_ignored(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    return run({**arguments, "d_total": None})


def _scale_forgotten(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    scale = arguments["scale"]
    return run({**arguments, "scale": None if scale is None else torch.ones_like(scale)})


def _statistics_of_the_next_row(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    return run({**arguments, "statistics": arguments["statistics"].roll(1, 1)})


def _one_row_missing(run: Run, arguments: Arguments) -> tuple[Tensor, ...]:
    d_residual, d_branch, sums = run(arguments)
    sums = sums.clone()
    sums[-1] -= d_residual.flatten(0, -2)[-1].float()
    return d_residual, d_branch, sums


_A = AddNormCase
OP = Op(
    tiny=(
        _A("fp32 stream, under autocast", stream="float32", parameters="mixed"),
        _A("LayerScale and DropPath", batch=5, stream="float32", parameters="mixed", scale=True, keep=True, width=72),
        _A("one dtype, width 63", width=63),
        _A("norm alone", branch=False, stream="float32", parameters="mixed"),
        _A("norm alone, one dtype", branch=False, width=192),
        _A("16-bit stream, fp32 parameters", parameters="mixed", width=136),
        _A("16-bit stream, LayerScale in fp32", parameters="mixed", total="bfloat16", scale=True, keep=True),
        _A("16-bit tokens, fp32 stream from here on", parameters="mixed", total="float32"),
        _A("DropPath alone", batch=4, stream="float32", parameters="mixed", keep=True),
        _A("LayerScale alone, no bias", stream="float32", parameters="mixed", scale=True, bias=False),
        _A("RMS norm", stream="float32", parameters="mixed", rms=True, norm_bias=False, scale=True),
        _A("RMS norm with a bias", rms=True, width=320),
        _A("no biases", stream="float32", parameters="mixed", bias=False, norm_bias=False),
        _A("fp32 normed", stream="float32", parameters="mixed", out="float32"),
        _A("width 1", tokens=40, width=1, rms=True),
        _A("width 1048", width=1048, tokens=3, stream="float32", parameters="mixed"),
        _A("width 4096", width=4096, tokens=2, batch=1),
        _A("sliced batch", layout="sliced_batch", width=80),
        _A("sliced rows", layout="sliced_rows", stream="float32", parameters="mixed"),
        _A("turned", layout="transposed", width=96),
        _A("many rows", batch=7, tokens=41, width=8, stream="float32", parameters="mixed", scale=True, keep=True),
        _A("one token", batch=1, tokens=1, width=384, stream="float32", parameters="mixed"),
        _A("empty batch", batch=0),
    ),
    large=(
        _A("ViT-S, batch 16", batch=16, tokens=197, width=384, stream="float32", parameters="mixed"),
        _A("ViT-B with LayerScale and DropPath", batch=8, tokens=197, width=768, stream="float32", parameters="mixed",
           scale=True, keep=True),
        _A("50,432 rows", batch=256, tokens=197, width=64, stream="float32", parameters="mixed", scale=True),
    ),
    quick=3,
    plain=plain,
    faults=(
        Fault("add_norm: bias dropped", "forward", forward=faults.bias_dropped),
        Fault("add_norm: last column of the norm wrong", "normed", forward=_last_column_of_the_norm_wrong),
        Fault("add_norm: the next sample's factor", "forward", forward=_neighbours_factor),
        Fault("add_norm: the stream's gradient ignored", "d_residual", backward=_stream_gradient_ignored),
        Fault("add_norm: scale forgotten in backward", "d_branch", backward=_scale_forgotten),
        Fault("add_norm: the next row's statistics", "d_weight", backward=_statistics_of_the_next_row),
        Fault("add_norm: a row missing from a sum", "d_scale", backward=_one_row_missing),
    ),
)  # fmt: skip
