"""`add_norm`: what torch expects of an op, derivatives of any order, autocast, torch.compile and bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvit import functional, reference
from fastvit.backend import launch_counts
from fastvit.validation import AddNormCase
from fastvit.validation.cases import DTYPES
from tests.ops.test_properties import hold
from tests.ops.test_registration import CHECKS, compile_counting
from tests.seen import Names

OP = "add_norm"
OPS = torch.ops.fastvit
B, T, D = 2, 5, 16
FP32, BF16 = torch.float32, torch.bfloat16


def make(device: str, batch: int = B, stream: torch.dtype = FP32) -> dict[str, Any]:
    tensors: dict[str, Any] = {
        name: torch.randn(batch, T, D, device=device).to(dtype).requires_grad_()
        for name, dtype in (("residual", stream), ("branch", BF16 if stream == BF16 else FP32))
    }
    for name in ("bias", "scale", "weight", "norm_bias"):
        tensors[name] = torch.randn(D, device=device, requires_grad=True)
    tensors["keep"] = (torch.rand(batch, device=device) < 0.7) / 0.7
    return tensors


def call(function: Callable[..., Any], tensors: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    tensors = dict(tensors)
    first = [tensors.pop(name, None) for name in ("residual", "branch", "bias")]
    return function(*first, **{"eps": 1e-6, **tensors, **options})


@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("stream", [FP32, BF16])
def test_opcheck(backend: str, device: str, rms: bool, scaled: bool, stream: torch.dtype) -> None:
    t = make(device, stream=stream)
    if not scaled:
        t["scale"] = t["keep"] = None
    names = ("residual", "branch", "bias", "scale", "keep", "weight", "norm_bias")
    arguments = (*(t[name] for name in names), 1e-6, rms, FP32, BF16, backend)
    torch.library.opcheck(OPS.add_norm.default, arguments, test_utils=CHECKS)
    alone = (t["residual"], None, None, None, None, t["weight"], None, 1e-6, rms, stream, BF16, backend)
    torch.library.opcheck(OPS.add_norm.default, alone, test_utils=CHECKS)
    total, normed, statistics = (tensor.detach() for tensor in OPS.add_norm(*arguments))
    t = {name: None if tensor is None else tensor.detach() for name, tensor in t.items()}
    for d_total in (None, torch.randn_like(total)):
        gradients = (
            total, torch.randn_like(normed), d_total, t["branch"], t["bias"], t["scale"], t["keep"], t["weight"],
            t["norm_bias"], statistics, rms, stream, backend,
        )  # fmt: skip
        torch.library.opcheck(OPS.add_norm_backward.default, gradients, test_utils=CHECKS)


def derivatives(function: Callable[..., Any], tensors: dict[str, Any], **options: Any) -> list[Tensor]:
    """Up to the third: each of a nonlinear function of those before, in every input."""
    wanted = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    total, normed = call(function, tensors, **options)
    loss = total.pow(2).mean() + normed.pow(3).mean()
    found: list[Tensor] = []
    for _ in range(3):
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        found += grads
        loss = sum((part.square().mean() for part in grads), torch.zeros_like(loss))
    return found


@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("missing", [(), ("scale",), ("keep", "norm_bias"), ("branch", "bias", "scale", "keep")])
def test_derivatives_up_to_the_third(backend: str, device: str, missing: tuple[str, ...], rms: bool) -> None:
    ours = {name: None if name in missing else tensor for name, tensor in make(device).items()}
    exact = {
        name: tensor if tensor is None else tensor.detach().double().requires_grad_(name != "keep")
        for name, tensor in ours.items()
    }
    found = derivatives(functional.add_norm, ours, rms=rms, backend=backend)
    truth = derivatives(reference.add_norm, exact, rms=rms)
    for ours_, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours_.double(), theirs, rtol=1e-4, atol=1e-6)
    assert {name for _, name in launch_counts()} == {backend}


def test_torch_func_and_forward_mode_run_the_reference(device: str) -> None:
    t = {name: tensor.detach() for name, tensor in make(device).items()}

    def loss(residual: Tensor) -> Tensor:
        return call(functional.add_norm, {**t, "residual": residual})[1].pow(2).sum()

    expected = torch.autograd.functional.jacobian(loss, t["residual"])
    torch.testing.assert_close(torch.func.grad(loss)(t["residual"]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="does not work under torch.func transforms"):
        torch.func.grad(lambda x: call(functional.add_norm, {**t, "residual": x}, backend="cpu")[1].sum())(
            t["residual"]
        )


def test_one_of_the_results_alone_is_used(backend: str, device: str) -> None:
    t = make(device)
    for place in (0, 1):
        mine, theirs = (copy.deepcopy({name: tensor.detach() for name, tensor in t.items()}) for _ in range(2))
        for tensors, function, options in (
            (mine, functional.add_norm, {"backend": backend}),
            (theirs, reference.add_norm, {}),
        ):
            for name, tensor in tensors.items():
                tensor.requires_grad_(name != "keep")
            call(function, tensors, **options)[place].square().sum().backward()
        for name, tensor in mine.items():
            if theirs[name].grad is not None:
                torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


def test_without_a_branch_the_sum_is_the_residual(backend: str, device: str) -> None:
    t = make(device)
    residual, weight = t["residual"], t["weight"]
    total, normed = functional.add_norm(residual, weight=weight, eps=1e-6, backend=backend)
    assert total.data_ptr() == residual.data_ptr() and torch.equal(total, residual)
    torch.testing.assert_close(normed, F.layer_norm(residual, (D,), weight, eps=1e-6))
    with torch.no_grad():
        assert functional.add_norm(residual, weight=weight, eps=1e-6, backend=backend)[0] is residual
    frozen = residual.detach()
    assert functional.add_norm(frozen, weight=weight, eps=1e-6, backend=backend)[0] is frozen


def test_what_comes_back_for_a_residual_is_added_where_the_norms_gradient_is_made(backend: str, device: str) -> None:
    t = make(device)
    residual, weight = t["residual"], t["weight"]
    total, normed = functional.add_norm(residual, weight=weight, eps=1e-6, backend=backend)
    loss = total.square().sum() + normed.pow(3).sum()
    with Names() as names:
        (found,) = torch.autograd.grad(loss, [residual])
    assert "fastvit.add_norm_backward.default" in names.seen and "aten.add.Tensor" not in names.seen
    again = F.layer_norm(residual, (D,), weight, eps=1e-6)
    torch.testing.assert_close(found, *torch.autograd.grad(residual.square().sum() + again.pow(3).sum(), [residual]))


def test_default_dtypes_are_those_of_torchs_own_addition_and_of_autocast(backend: str, device: str) -> None:
    t = make(device, stream=BF16)
    plain = {name: t[name] for name in ("residual", "branch", "bias", "weight")}
    assert [out.dtype for out in call(functional.add_norm, plain, backend=backend)] == [BF16, BF16]
    scaled = call(functional.add_norm, {**plain, "scale": t["scale"]}, backend=backend)
    assert [out.dtype for out in scaled] == [FP32, FP32]
    with torch.autocast(device, BF16):
        total, normed = call(functional.add_norm, {**plain, "residual": t["residual"].float()}, backend=backend)
    assert (total.dtype, normed.dtype) == (FP32, BF16)
    total, normed = call(functional.add_norm, plain, residual_dtype=FP32, dtype=torch.float16, backend=backend)
    assert (total.dtype, normed.dtype) == (FP32, torch.float16)


def test_compiles_whole_and_once_for_all_batch_sizes(device: str, backend: str) -> None:
    parameters = {name: tensor for name, tensor in make(device).items() if tensor.dim() == 1 and name != "keep"}

    def step(residual: Tensor, branch: Tensor, keep: Tensor) -> Tensor:
        tensors = {"residual": residual, "branch": branch, "keep": keep, **parameters}
        total, normed = call(functional.add_norm, tensors, backend=backend)
        return (total * normed).sum()

    compiled, graphs = compile_counting(step, dynamic=True)
    first = 0
    for batch in (2, 3, 4, 7):
        t = make(device, batch)
        results = []
        for function in (compiled, step):
            for tensor in (*parameters.values(), t["residual"], t["branch"]):
                tensor.grad = None
            function(t["residual"], t["branch"], t["keep"]).backward()
            results.append([tensor.grad for tensor in (*parameters.values(), t["residual"], t["branch"])])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
        first = first or len(graphs)
    assert len(graphs) == first


def test_exported_it_is_standard_operators(device: str) -> None:
    from fastvit.ops import decompositions

    t = make(device)

    class Add(torch.nn.Module):
        def forward(self, residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return functional.add_norm(residual, branch, weight=weight, eps=1e-6)

    inputs = tuple(t[name].detach() for name in ("residual", "branch", "weight"))
    program = torch.export.export(Add(), inputs).run_decompositions(decompositions())
    assert not [node for node in program.graph.nodes if "fastvit" in str(node.target)]
    for mine, theirs in zip(program.module()(*inputs), Add()(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


@st.composite
def cases(draw: st.DrawFn) -> AddNormCase:
    total = draw(st.sampled_from([None, "float32", "bfloat16"]))
    return AddNormCase(
        name=f"example {draw(st.integers(0, 1_000_000))}",
        batch=draw(st.integers(0, 4)),
        tokens=draw(st.integers(1, 40)),
        width=draw(st.integers(2, 200) | st.sampled_from([8, 64, 264, 384, 520])),
        layout=draw(st.sampled_from(["contiguous", "sliced_batch", "sliced_rows", "transposed"])),
        stream=draw(st.sampled_from(["same", "float32"])),
        total=total if draw(st.booleans()) else None,
        branch=draw(st.booleans()) or total is not None,
        bias=draw(st.booleans()),
        scale=draw(st.booleans()),
        keep=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        rms=draw(st.booleans()),
        parameters=draw(st.sampled_from(["same", "mixed"])),
        out=draw(st.sampled_from([None, "float32", "bfloat16"])),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases())
def test_any_case(case: AddNormCase, backend: str, dtype: str, device: str) -> None:
    hold(case, backend, dtype, device)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"residual": [1.0]}, TypeError, "residual: expected a torch.Tensor, got list"),
    ({"residual": torch.zeros(())}, ValueError, r"residual: expected shape \[..., D\] with D from 1 to 8192, got \[\]"),
    ({"residual": torch.zeros(2, 9000)}, ValueError, r"residual: expected shape .* got \[2, 9000\]"),
    ({"residual": torch.zeros(B, T, D, dtype=torch.int32)}, TypeError, "residual: dtype torch.int32"),
    ({"branch": torch.zeros(T, D)}, ValueError, r"branch: shape \[5, 16\], but residual has \[2, 5, 16\]"),
    ({"branch": torch.zeros(B, T, D, dtype=torch.bool)}, TypeError, "branch: dtype torch.bool"),
    ({"branch": torch.zeros(B, T, D, device="meta")}, ValueError, "branch: on device meta, but residual is on"),
    ({"branch": None}, ValueError, "bias: it belongs to the branch, and there is none"),
    ({"branch": None, "bias": None}, ValueError, "scale: it belongs to the branch"),
    ({"bias": torch.zeros(D + 1)}, ValueError, r"bias: expected shape \[16\], got \[17\]"),
    ({"scale": torch.zeros(1, D)}, ValueError, r"scale: expected shape \[16\], got \[1, 16\]"),
    ({"weight": torch.zeros(D, dtype=torch.int64)}, TypeError, "weight: dtype torch.int64"),
    ({"norm_bias": 0.0}, TypeError, "norm_bias: expected a torch.Tensor, got float"),
    ({"keep": torch.ones(B + 1)}, ValueError, r"keep: expected a value a sample of residual \[2, 5, 16\], got \[3\]"),
    ({"keep": torch.ones(B, dtype=torch.bool)}, TypeError, "keep: dtype torch.bool"),
    ({"keep": torch.ones(B, requires_grad=True)}, ValueError, "keep: it has no gradient; detach it"),
    ({"eps": -1e-6}, ValueError, "eps: -1e-06 must not be negative"),
    ({"dtype": torch.int8}, TypeError, "dtype: dtype torch.int8"),
    ({"residual_dtype": torch.uint8}, TypeError, "residual_dtype: dtype torch.uint8"),
    ({"branch": None, "bias": None, "scale": None, "keep": None, "residual_dtype": BF16}, ValueError,
     "residual_dtype: without a branch the sum is the residual itself, in torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:48] for _, _, message in WRONG])
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(functional.add_norm, {**make("cpu"), **change})
    assert not launch_counts()


def test_one_token_alone(backend: str, device: str) -> None:
    token, weight = (torch.randn(D, device=device, requires_grad=True) for _ in range(2))
    total, normed = functional.add_norm(token, token.detach(), weight=weight, eps=1e-6, backend=backend)
    (total.sum() + normed.square().sum()).backward()
    assert normed.shape == (D,) and token.grad is not None and weight.grad is not None
