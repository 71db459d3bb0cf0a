"""What bias_act and split_heads launch is in the manifest, whatever the call, and compiled once for all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit.checks import ACTS
from tests.compile.test_manifest import FLOATS, Recorder, recorder  # noqa: F401, the fixture

BF16, FP32 = torch.bfloat16, torch.float32


def bias_act(
    dtype: torch.dtype = BF16,
    parameters: torch.dtype = FP32,
    out: torch.dtype = BF16,
    rows: int = 5,
    width: int = 16,
    act: str = "gelu",
    form: str = "plain",
    bias: bool = True,
    offset: int = 0,
) -> None:
    """Forward and backward on tensors whose values are never read; `offset` moves them in memory."""
    from fastvit.kernels import bias_act as kernels

    def moved(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)

    gate_last = {"gate first": False, "gate last": True}.get(form)
    features = width if gate_last is None else 2 * width
    up, up_bias = (moved(rows, width), moved(width, dtype=parameters)) if form == "two" else (None, None)
    given = moved(rows, features), moved(features, dtype=parameters) if bias else None, up, up_bias if bias else None
    assert kernels.forward(*given, act, gate_last, out).shape == (rows, width)
    kernels.backward(moved(rows, width, dtype=out), *given, act, gate_last)


def split_heads(
    dtype: torch.dtype = BF16,
    batch: int = 2,
    tokens: int = 3,
    heads: int = 2,
    width: int = 8,
    turned: bool = False,
    bias: bool = True,
    offset: int = 0,
) -> None:
    """Backward, likewise."""
    from fastvit.kernels import split_heads as kernels

    shape = (batch, tokens, heads, width) if turned else (batch, heads, tokens, width)
    size = torch.Size(shape).numel()
    grads = [torch.empty(size + offset, dtype=dtype)[offset:].view(shape) for _ in range(3)]
    d_q, d_k, d_v = (grad.transpose(1, 2) if turned else grad for grad in grads)
    assert kernels.backward(d_q, d_k, d_v, bias)[0].shape == (batch, tokens, 3 * heads * width)


@settings(max_examples=100)
@given(
    arguments=st.fixed_dictionaries(
        {
            "dtype": FLOATS,
            "parameters": FLOATS,
            "out": FLOATS,
            "rows": st.sampled_from([1, 5, 1000]),
            "width": st.sampled_from([1, 8, 17, 128, 136]),
            "act": st.sampled_from(ACTS),
            "form": st.sampled_from(["plain", "two", "gate first", "gate last"]),
            "bias": st.booleans(),
            "offset": st.sampled_from([0, 0, 1, 8]),
        }
    )
)
def test_bias_act_reaches_the_manifest_alone(recorder: Recorder, arguments: dict[str, Any]) -> None:  # noqa: F811
    recorder.seen.clear()
    bias_act(**arguments)
    fits = arguments["width"] % 8 == 0 and arguments["out"] == arguments["dtype"] and arguments["offset"] != 1
    assert bool(recorder.seen) == fits


@settings(max_examples=100)
@given(
    arguments=st.fixed_dictionaries(
        {
            "dtype": FLOATS,
            "batch": st.sampled_from([1, 3]),
            "tokens": st.sampled_from([1, 5, 400]),
            "heads": st.sampled_from([1, 3, 12]),
            "width": st.sampled_from([1, 8, 20, 64, 72]),
            "turned": st.booleans(),
            "bias": st.booleans(),
            "offset": st.sampled_from([0, 0, 1, 8]),
        }
    )
)
def test_split_heads_reaches_the_manifest_alone(recorder: Recorder, arguments: dict[str, Any]) -> None:  # noqa: F811
    recorder.seen.clear()
    split_heads(**arguments)
    assert bool(recorder.seen) == (arguments["width"] % 8 == 0 and arguments["offset"] != 1)


@pytest.mark.parametrize("form", ["plain", "two", "gate first", "gate last"])
def test_one_specialisation_for_all_sizes_and_functions(recorder: Recorder, form: str) -> None:  # noqa: F811
    for rows, width, act in ((1, 8, "gelu"), (16, 128, "relu"), (17, 136, "silu"), (4000, 3072, "gelu_tanh")):
        bias_act(rows=rows, width=width, act=act, form=form)
    for batch, tokens, heads, width in ((1, 1, 1, 8), (2, 16, 16, 16), (3, 197, 12, 64)):
        for turned in (False, True):
            split_heads(batch=batch, tokens=tokens, heads=heads, width=width, turned=turned)
    launched = [entry.kernel for entry, _ in recorder.seen if entry.kernel != "sum_partials"]
    assert sorted(launched) == ["bias_act_backward", "bias_act_forward", "pack_heads"]
