"""attention as one op on a CPU, and put together of split_heads and PyTorch's own everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvit import functional, native, reference
from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.native.attention import MOST_TOKENS
from fastvit.validation.tolerance import assert_close
from tests.ops.test_registration import CHECKS

OPS = torch.ops.fastvit
B, T, H, D = 2, 5, 3, 24
CPU = [
    "cpu",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(bool(native.why_unavailable("cpu")), reason=native.why_unavailable("cpu") or "there"),
    ),
]


def make(tokens: int = T, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, tokens, 3 * D, dtype=dtype).requires_grad_(), torch.randn(3 * D).requires_grad_()


def launched() -> set[str]:
    return {op for (op, _), count in launch_counts().items() if count}


@pytest.mark.parametrize("name", CPU)
def test_opcheck(name: str) -> None:
    qkv, bias = make()
    # Its last check takes every result for one that is differentiated.
    torch.library.opcheck(OPS.attention.default, (qkv, bias, H, 0.3, name), test_utils=CHECKS[:-1])
    torch.library.opcheck(OPS.attention.default, (qkv.detach(), bias.detach(), H, 0.3, name), test_utils=CHECKS)
    out, logsums = (result.detach() for result in OPS.attention(qkv, bias, H, 0.3, name))
    grad = torch.randn_like(out).requires_grad_()
    for with_bias in (None, bias):
        arguments = grad, qkv, with_bias, out, logsums, H, 0.3, name
        torch.library.opcheck(OPS.attention_backward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", CPU)
def test_derivatives_of_the_second_order(name: str) -> None:
    found = []
    for function in (reference.attention, lambda *given: functional.attention(*given, backend=name)):
        torch.manual_seed(0)
        given = make()
        (d_qkv, d_bias) = torch.autograd.grad(function(*given, H).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(d_qkv.square().sum() + d_bias.square().sum(), given))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CPU)
def test_it_is_one_op(name: str) -> None:
    qkv, bias = make()
    functional.attention(qkv, bias, H, backend=name).sum().backward()
    assert launched() == {"attention", "attention_backward"}


def masked() -> dict[str, Any]:
    return {"attn_mask": torch.ones(T, T, dtype=torch.bool).tril()}


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"dropout": 0.5}, masked()], ids=["causal", "dropout", "mask"]
)
@pytest.mark.parametrize("name", CPU)
def test_what_it_does_not_do_is_pytorchs(name: str, options: dict[str, Any]) -> None:
    qkv, bias = make()
    torch.manual_seed(1)
    ours = functional.attention(qkv, bias, H, backend=name, **options)
    named = {"dropout_p" if key == "dropout" else key: value for key, value in options.items()}
    torch.manual_seed(1)
    theirs = F.scaled_dot_product_attention(*reference.split_heads(qkv, None, H), **named)
    assert torch.equal(ours, theirs.transpose(1, 2).flatten(2))
    assert "attention" not in launched()


@pytest.mark.parametrize("name", CPU)
def test_as_many_tokens_as_it_takes(name: str) -> None:
    for tokens, is_one in ((MOST_TOKENS, True), (MOST_TOKENS + 1, False)):
        reset_launch_counts()
        qkv, bias = make(tokens)
        ours = functional.attention(qkv, bias, H, backend=name)
        exact = reference.attention(qkv.double(), None, H)
        assert_close(ours, exact, reference.attention(qkv, None, H), "tokens")
        assert ("attention" in launched()) is is_one
    if name == "native":
        with pytest.raises(RuntimeError, match=f"qkv: {MOST_TOKENS + 1} tokens; they must be at most {MOST_TOKENS}"):
            torch.ops.fastvit_native.attention_cuda(qkv.detach(), H, 1.0)


@pytest.mark.parametrize("name", CPU)
def test_a_kernel_of_pytorchs_that_is_named_runs(name: str) -> None:
    qkv, bias = make()
    with sdpa_kernel(SDPBackend.MATH):
        functional.attention(qkv, bias, H, backend=name)
    assert "attention" not in launched()


@pytest.mark.parametrize("name", CPU)
def test_autocast_casts_as_pytorch_does(name: str) -> None:
    qkv, bias = make()
    with torch.autocast("cpu", torch.bfloat16):
        found = [functional.attention(tensor, bias, H, backend=name) for tensor in (qkv, qkv.bfloat16())]
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2
    assert launch_counts()["attention", name] == 1


def test_a_compiler_is_given_pytorchs() -> None:
    qkv, bias = make()
    compiled = torch.compile(lambda *given: functional.attention(*given, H), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, bias), reference.attention(qkv, None, H))
    assert "attention" not in launched()


def test_transforms_are_the_references() -> None:
    qkv, _ = make()
    gradient = torch.func.grad(lambda x: functional.attention(x, None, H).square().sum())(qkv.detach())
    reference.attention(qkv, None, H).square().sum().backward()
    torch.testing.assert_close(gradient, qkv.grad)


def test_float64_and_a_backend_without_it_are_put_together() -> None:
    qkv, bias = make(dtype=torch.float64)
    functional.attention(qkv, bias.double(), H)
    functional.attention(qkv, bias.double(), H, backend="reference")
    assert "attention" not in launched()
    with pytest.raises(RuntimeError, match="'cuda' can't run on device 'cpu'"):
        functional.attention(qkv.float(), bias, H, backend="cuda")


def test_a_scale_is_a_number() -> None:
    with pytest.raises(TypeError, match="scale: expected a number, got 'large'"):
        functional.attention(*make(), H, scale="large")  # type: ignore[arg-type]
    assert launched() == set()


def test_flops_are_those_of_its_two_products() -> None:
    qkv, bias = make()
    with FlopCounterMode(display=False) as counter:
        functional.attention(qkv, bias, H, backend="cpu").sum().backward()
    of_one = 2 * B * T * T * D
    assert counter.get_total_flops() == 2 * of_one + 5 * of_one


@pytest.mark.skipif(bool(native.why_unavailable("cpu")), reason=native.why_unavailable("cpu") or "there")
def test_numbers_that_are_none_are_seen() -> None:
    for value in (float("nan"), float("inf")):
        qkv = torch.randn(1, 40, 3 * D)
        qkv[0, 20, 0] = value  # a query of the first head
        out = functional.attention(qkv, None, H, backend="native")[0]
        assert out[20, : D // H].isnan().all()
        assert out[19].isfinite().all() and out[20, D // H :].isfinite().all()
