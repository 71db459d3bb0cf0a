"""split_heads and attention: views forward, one packed gradient and the bias's backward, behind PyTorch's attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import functional, reference
from fastvit.backend import launch_counts
from fastvit.validation.tolerance import assert_close, relative_error
from tests.ops.test_registration import CHECKS

OP = "split_heads"
OPS = torch.ops.fastvit
B, T, H, D = 2, 5, 3, 24
# Of sums that are added in another order: those for the keys' bias cancel out, but for their roundings.
SUMMED = {"rtol": 1e-5, "atol": 1e-4}


def make(device: str, *, batch: int = B, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tokens, and the weight and bias of the linear layer."""
    shapes = (batch, T, D), (3 * D, D), (3 * D,)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def block(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return functional.attention(F.linear(x, weight, bias.detach()), bias, H, **options)


def plainly(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    q, k, v = F.linear(x, weight, bias).reshape(*x.shape[:2], 3, H, -1).permute(2, 0, 3, 1, 4)
    if "dropout" in options:
        options["dropout_p"] = options.pop("dropout")
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def test_opcheck(backend: str, device: str) -> None:
    for has_bias, turned in itertools.product((False, True), (False, True)):
        shape = (B, T, H, 8) if turned else (B, H, T, 8)
        grads = [torch.randn(shape, device=device) for _ in range(3)]
        args = [grad.transpose(1, 2) if turned else grad for grad in grads]
        args = [grad.requires_grad_() for grad in args]
        torch.library.opcheck(OPS.split_heads_backward.default, (*args, has_bias, backend), test_utils=CHECKS)


def test_forward_is_made_of_views(backend: str, device: str) -> None:
    qkv, bias = torch.randn(B, T, 3 * D, device=device), torch.randn(3 * D, device=device)
    for requires_grad in (False, True):
        parts = functional.split_heads(qkv.requires_grad_(requires_grad), bias, H, backend=backend)
        expected = qkv.view(B, T, 3, H, 8).permute(2, 0, 3, 1, 4)
        for part, view in zip(parts, expected, strict=True):
            assert part.data_ptr() == view.data_ptr() and part.stride() == view.stride()
    assert launch_counts() == {}


def test_the_bias_is_not_read(backend: str, device: str) -> None:
    qkv = torch.randn(B, T, 3 * D, device=device)
    bias = torch.full((3 * D,), torch.nan, device=device, requires_grad=True)
    q, k, v = functional.split_heads(qkv, bias, H, backend=backend)
    (2 * q + 3 * k + 4 * v).sum().backward()
    expected = torch.tensor([2.0, 3.0, 4.0], device=device).repeat_interleave(D) * B * T
    assert bias.grad is not None and torch.equal(bias.grad, expected)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.2}, {"attn_mask": True}], ids=["plain", "causal", "scale", "mask"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_pytorchs(backend: str, device: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    leaves = make(device)
    if "attn_mask" in options:
        options = {"attn_mask": torch.rand(B, 1, T, T, device=device) < 0.7}
        options["attn_mask"][..., 0] = True
    grad = torch.randn(B, T, D, device=device)

    def results(function: Callable[..., Tensor], inputs: list[Tensor], **more: Any) -> list[Tensor]:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32 and inputs[0].dtype != torch.float64):
            out = function(*inputs, **options, **more)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    exact = results(plainly, [leaf.detach().double().requires_grad_() for leaf in leaves])
    ours, theirs = results(block, leaves, backend=backend), results(plainly, leaves)
    assert backend == "native" or torch.equal(ours[0], theirs[0])
    for number, three in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_close(*three, f"result {number}")
    is_one = backend in ("cpu", "native") and set(options) <= {"scale"}  # tests/ops/test_attention.py
    ran = ("attention", "attention_backward") if is_one else ("split_heads_backward",)
    assert launch_counts() == dict.fromkeys(((op, backend) for op in ran), 1)


def test_dropout_draws_as_pytorch_does(backend: str, device: str) -> None:
    leaves, outs = make(device), []
    for function, options in ((block, {"backend": backend}), (plainly, {})):
        torch.manual_seed(1)
        outs.append(function(*leaves, dropout=0.5, **options))
    assert torch.equal(*outs) and not torch.equal(outs[0], block(*leaves))


def test_derivatives_up_to_the_third(backend: str, device: str) -> None:
    leaves = make(device)

    def derivatives(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        with sdpa_kernel(SDPBackend.MATH):  # the one with further derivatives
            out = function(*inputs, **options)
            found, loss = [out], out.pow(3).mean()
            for _ in range(3):
                grads = torch.autograd.grad(loss, inputs, create_graph=True)
                found += grads
                loss = sum((part.square().mean() for part in grads), torch.zeros_like(loss))
        return found

    ours = derivatives(block, torch.float32, backend=backend)
    theirs, exact = (derivatives(plainly, dtype) for dtype in (torch.float32, torch.float64))
    for number, three in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_close(*three, f"result {number}")


def test_float64_goes_to_the_reference(device: str) -> None:
    q, bias = torch.randn(B, T, 3 * D, dtype=torch.float64, device=device), torch.randn(3 * D, dtype=torch.float64)
    inputs = q.requires_grad_(), bias.to(device).requires_grad_()

    def split(qkv: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return functional.split_heads(qkv + bias.detach(), bias, H)

    def added(qkv: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return reference.split_heads(qkv + bias, None, H)

    grads = [torch.autograd.grad([part.pow(3).sum() for part in run(*inputs)], inputs) for run in (split, added)]
    torch.testing.assert_close(*grads)
    assert launch_counts() == {}


def test_norms_and_rotations_go_between(backend: str, device: str) -> None:
    """Only some parts used, some changed on the way: one packed gradient all the same."""
    leaves = make(device)
    grads = []
    for bias_of_product, bias, options in (
        (leaves[2].detach(), leaves[2], {"backend": backend}),
        (leaves[2], None, {}),
    ):
        qkv = F.linear(leaves[0], leaves[1], bias_of_product)
        q, k, v = functional.split_heads(qkv, bias, H, **options)
        q, k = F.layer_norm(q, q.shape[-1:]), torch.cat([-k[..., 4:], k[..., :4]], -1)
        grads.append(
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), leaves, retain_graph=True)
        )
        grads.append(torch.autograd.grad(v.square().sum(), leaves))  # no gradient of q and k
    for ours, theirs in zip(grads[:2], grads[2:], strict=True):
        torch.testing.assert_close(ours, theirs, **SUMMED)


def test_the_gradients_asked_for(backend: str, device: str) -> None:
    for wanted in itertools.product((False, True), repeat=2):
        qkv, bias = torch.randn(B, T, 3 * D, device=device), torch.randn(3 * D, device=device)
        qkv.requires_grad_(wanted[0]), bias.requires_grad_(wanted[1])
        q, k, v = functional.split_heads(qkv, bias, H, backend=backend)
        assert all(part.requires_grad == any(wanted) for part in (q, k, v))
        if any(wanted):
            (q * k * v).sum().backward()
        assert (qkv.grad is not None, bias.grad is not None) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole_and_once_for_all_batch_sizes(backend: str, device: str, dtype: torch.dtype) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    parameters = make(device)[1:]
    # An eager call has attention as one op there.
    tolerance = 0.0 if backend != "native" else 5e-2 if dtype == torch.bfloat16 else 1e-5

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return block(x, *parameters, backend=backend).float().square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compiled(make(device)[0])
    compilations = counter.frame_count
    for batch in (2, 3, 7, 8):
        x, found = make(device, batch=batch)[0], []
        for run in (compiled, step):
            x.grad = None
            for parameter in parameters:
                parameter.grad = None
            run(x).backward()
            found.append([x.grad, *(parameter.grad for parameter in parameters)])
        for ours, eager in zip(*found, strict=True):
            assert relative_error(ours, eager) <= tolerance
    assert counter.frame_count == compilations


class Attention(torch.nn.Module):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.qkv, self.backend = torch.nn.Linear(D, 3 * D), backend

    def forward(self, x: Tensor) -> Tensor:
        return block(x, self.qkv.weight, self.qkv.bias, backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_as_standard_operators(backend: str, device: str, strict: bool) -> None:
    module, x = Attention(backend).to(device), make(device)[0].detach()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") or "getitem" in name for name in called), called
    assert not any(name.startswith(("aten.add", "aten.sub")) for name in called)
    for size in (2, 5):
        x = make(device, batch=size)[0].detach()
        torch.testing.assert_close(program.module()(x), module(x))


def test_what_is_traced_or_exported_can_be_trained(device: str, tmp_path: Path) -> None:
    module, x = Attention(None).to(device), make(device)[0].detach()
    module(x).square().sum().backward()
    expected = module.qkv.bias.grad
    torch.jit.save(torch.jit.trace(module, x), tmp_path / "traced.pt")
    for program in (torch.jit.load(tmp_path / "traced.pt"), torch.export.export(module, (x,)).module()):
        program.zero_grad()
        program(x).square().sum().backward()
        torch.testing.assert_close(program.qkv.bias.grad, expected)


def test_under_torch_func_the_reference_runs(device: str, backend: str) -> None:
    leaves = [leaf.detach() for leaf in make(device)]
    for argnums in (0, 1, 2):
        grads = [
            torch.func.grad(lambda *t, f=f: f(*t).square().sum(), argnums=argnums)(*leaves) for f in (block, plainly)
        ]
        torch.testing.assert_close(*grads)
    per_sample = torch.func.vmap(lambda x: block(x[None], *leaves[1:]))(leaves[0])
    torch.testing.assert_close(per_sample[:, 0], plainly(*leaves))
    with pytest.raises(RuntimeError, match="does not work under torch.func"):
        torch.func.vmap(lambda x: block(x[None], *leaves[1:], backend=backend))(leaves[0])
    assert launch_counts() == {}


def test_checkpoints(backend: str, device: str) -> None:
    leaves = make(device)
    out = torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=False, backend=backend)
    kept = block(*leaves, backend=backend)
    ours, theirs = (torch.autograd.grad(result.square().sum(), leaves) for result in (out, kept))
    assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))


QKV, BIAS = torch.randn(2, 5, 18), torch.randn(18)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qkv": [1.0]}, TypeError, "qkv: expected a torch.Tensor, got list"),
    ({"qkv": QKV[0]}, ValueError, r"qkv: expected shape \[B, T, 3D\] with D a multiple of 3 heads, got \[5, 18\]"),
    ({"num_heads": 4}, ValueError, r"qkv: expected shape .* multiple of 4 heads, got \[2, 5, 18\]"),
    ({"num_heads": 0}, ValueError, "num_heads: 0 must be at least 1"),
    ({"num_heads": 1.5}, TypeError, "num_heads: expected a whole number, got 1.5"),
    ({"qkv": QKV.int()}, TypeError, "qkv: dtype torch.int32 is not supported"),
    ({"bias": BIAS[:6]}, ValueError, r"bias: expected shape \[18\], got \[6\]"),
    ({"bias": BIAS.to("meta")}, ValueError, "bias: on device meta, but qkv is on"),
    ({"backend": "tritn"}, ValueError, "backend: unknown backend 'tritn'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
@pytest.mark.parametrize("function", [functional.split_heads, functional.attention])
def test_wrong_arguments(
    function: Callable[..., Any], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        function(**{"qkv": QKV, "bias": BIAS, "num_heads": 3, **change})
    assert launch_counts() == {}
