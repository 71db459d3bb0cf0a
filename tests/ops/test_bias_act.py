"""bias_act: what torch expects of an op, derivatives, wrong arguments, and the modules it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import checks, functional, reference
from fastvit.backend import launch_counts
from fastvit.peers import import_peer
from fastvit.validation.tolerance import assert_close
from tests.libraries import needs
from tests.ops.test_registration import CHECKS

OP = "bias_act"
OPS = torch.ops.fastvit
FORMS = {
    "plain": {},
    "two products": {"up": True},
    "gate first": {"gate_last": False},
    "gate last": {"gate_last": True},
}


def make(form: str, device: str, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    features = 48 if form.startswith("gate") else 24
    tensors = {"x": torch.randn(batch, 5, features), "bias": torch.randn(features)}
    if form == "two products":
        tensors |= {"up": torch.randn(batch, 5, 24), "up_bias": torch.randn(24)}
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}


def call(function: Callable[..., Tensor], form: str, tensors: dict[str, Tensor], act: str, **more: Any) -> Tensor:
    return function(**tensors, act=act, gate_last=FORMS[form].get("gate_last"), **more)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_opcheck(backend: str, device: str, form: str, act: str) -> None:
    t = make(form, device)
    arguments = [t.get(name) for name in ("x", "bias", "up", "up_bias")]
    rest = (act, FORMS[form].get("gate_last"))
    torch.library.opcheck(OPS.bias_act.default, (*arguments, *rest, torch.float32, backend), test_utils=CHECKS)
    plain = [None if tensor is None else tensor.detach() for tensor in arguments]
    grad = torch.randn(2, 5, 24, device=device)
    for bias, up_bias in ((plain[1], plain[3]), (None, None)):
        args = (grad, plain[0], bias, plain[2], up_bias, *rest, backend)
        torch.library.opcheck(OPS.bias_act_backward.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", checks.ACTS)
def test_derivatives_up_to_the_second(backend: str, device: str, form: str, act: str) -> None:
    tensors = make(form, device)

    def derivatives(function: Callable[..., Tensor], dtype: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        out = call(function, form, leaves, act, **more)
        grads = torch.autograd.grad(out.pow(3).mean(), list(leaves.values()), create_graph=True)
        loss = sum((grad.square().mean() for grad in grads), torch.zeros((), dtype=dtype, device=device))
        return [out, *grads, *torch.autograd.grad(loss, list(leaves.values()))]

    ours = derivatives(functional.bias_act, torch.float32, backend=backend)
    theirs, exact = (derivatives(reference.bias_act, dtype) for dtype in (torch.float32, torch.float64))
    for number, three in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_close(*three, f"result {number}")
    assert {name for _, name in launch_counts()} == {backend}


@pytest.mark.parametrize("act", checks.ACTS)
def test_gradcheck_through_the_reference(act: str) -> None:
    for form in FORMS:
        tensors = make(form, "cpu", dtype=torch.float64)

        def run(*leaves: Tensor, form: str = form, names: tuple[str, ...] = tuple(tensors)) -> Tensor:
            return call(functional.bias_act, form, dict(zip(names, leaves, strict=True)), act)

        assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)
    assert launch_counts() == {}


def test_large_and_missing_numbers(backend: str, device: str) -> None:
    large = [30.0, 1e4, 1e20]  # of which the square is infinite in float32
    few = torch.tensor([*large, *(-value for value in large), -0.0, 0.0, torch.nan, -torch.inf], device=device)
    for act in checks.ACTS:
        known = few if act == "relu" else few[:-1]
        for dtype in (torch.float32, torch.bfloat16):
            x = known.to(dtype).repeat(16).requires_grad_()  # kernels take rows of whole vectors
            out, exact = functional.bias_act(x, act=act, backend=backend), reference.bias_act(x.double(), act=act)
            torch.testing.assert_close(out.double(), exact, equal_nan=True, rtol=1e-2, atol=1e-6)
            if backend == "cpu" and act == "gelu_tanh":
                continue  # PyTorch's own has no slope at 1e20
            slope, exact_slope = (torch.autograd.grad(each.sum(), x)[0] for each in (out, exact))
            torch.testing.assert_close(slope, exact_slope, equal_nan=True, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_it_keeps_its_arguments_alone(backend: str, device: str, form: str) -> None:
    tensors, kept = make(form, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        call(functional.bias_act, form, tensors, "gelu", backend=backend)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in tensors.values()}


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_and_once_for_all_batch_sizes(backend: str, device: str, form: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    parameters = make(form, device)

    def step(*products: Tensor) -> Tensor:
        tensors = parameters | dict(zip(("x", "up"), products, strict=False))
        return call(functional.bias_act, form, tensors, "gelu", backend=backend).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 7, 8):
        products = [tensor for name, tensor in make(form, device, batch=batch).items() if "bias" not in name]
        found = []
        for run in (compiled, step):
            for tensor in parameters.values():
                tensor.grad = None
            run(*products).backward()
            found.append([parameters["bias"].grad, *(product.grad for product in products)])
            for product in products:
                product.grad = None
        for ours, eager in zip(*found, strict=True):
            assert torch.equal(ours, eager)
    assert counter.frame_count == 1


def test_exports_under_autocast(backend: str, device: str) -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = torch.nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            product = torch.nn.functional.linear(x, self.fc1.weight)
            return functional.bias_act(product, self.fc1.bias, backend=backend)

    module, x = Mlp().to(device), torch.randn(2, 8, device=device)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for size in (2, 5):
        x = torch.randn(size, 8, device=device)
        assert torch.equal(program.module()(x), module(x))
    with torch.autocast(device, torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert module.fc1.bias.grad is not None and module.fc1.bias.grad.dtype == torch.float32


def test_under_torch_func_the_reference_runs(device: str, backend: str) -> None:
    t = make("plain", device)
    x, bias = t["x"].detach(), t["bias"].detach()
    grads = torch.func.grad(lambda x: functional.bias_act(x, bias).square().sum())(x)
    torch.testing.assert_close(grads, torch.autograd.grad(functional.bias_act(t["x"], bias).square().sum(), t["x"])[0])
    with pytest.raises(RuntimeError, match="does not work under torch.func"):
        torch.func.vmap(lambda x: functional.bias_act(x, bias, backend=backend))(x)


@needs("timm")
def test_it_is_what_the_mlps_of_timm_compute(backend: str, device: str) -> None:
    layers = import_peer("timm.layers")
    linear = torch.nn.functional.linear
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16, device=device)
    packed = {
        "gate first": (layers.SwiGLUPacked(16, 48).to(device), "silu"),
        "gate last": (layers.GluMlp(16, 48, act_layer=torch.nn.GELU).to(device), "gelu"),
        "plain": (layers.Mlp(16, 48).to(device), "gelu"),
    }
    for form, (mlp, act) in packed.items():
        gate_last = FORMS[form].get("gate_last")
        hidden = functional.bias_act(linear(x, mlp.fc1.weight), mlp.fc1.bias, act, gate_last=gate_last, backend=backend)
        torch.testing.assert_close(mlp.fc2(hidden), mlp(x))
    mlp = layers.SwiGLU(16, 24).to(device)
    hidden = functional.bias_act(
        linear(x, mlp.fc1_g.weight), mlp.fc1_g.bias, "silu", up=linear(x, mlp.fc1_x.weight), up_bias=mlp.fc1_x.bias,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(mlp.fc2(hidden), mlp(x))


X, BIAS = torch.randn(2, 3, 8), torch.randn(8)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., F\] with F from 1 to 65536, got \[\]"),
    ({"x": torch.empty(1, 65537, device="meta")}, ValueError, "x: expected shape .* to 65536, got"),
    ({"x": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "x: dtype torch.int32 is not supported"),
    ({"bias": torch.randn(7)}, ValueError, r"bias: expected shape \[8\], got \[7\]"),
    ({"bias": torch.randn(8, device="meta")}, ValueError, "bias: on device meta, but x is on"),
    ({"bias": torch.zeros(8, dtype=torch.int8)}, TypeError, "bias: dtype torch.int8"),
    ({"act": "mish"}, ValueError, "act: unknown 'mish'; known: gelu, gelu_tanh, quick_gelu, relu, silu"),
    ({"up": torch.randn(2, 3, 4)}, ValueError, r"up: shape \[2, 3, 4\], but x has \[2, 3, 8\]; they must match"),
    ({"up": X.bfloat16()}, TypeError, "up: dtype torch.bfloat16 is not supported; accepted: torch.float32"),
    ({"up": X, "up_bias": torch.randn(1)}, ValueError, r"up_bias: expected shape \[8\], got \[1\]"),
    ({"up_bias": BIAS}, ValueError, "up_bias: it belongs to up, and there is none"),
    ({"up": X, "gate_last": True}, ValueError, "up: with gate_last it is half of x"),
    ({"x": X[..., :7], "bias": BIAS[:7], "gate_last": False}, ValueError, "x: with gate_last its last size is halved"),
    ({"gate_last": "first"}, TypeError, "gate_last: expected True, False or None, got 'first'"),
    ({"dtype": torch.int64}, TypeError, "dtype: dtype torch.int64 is not supported"),
    ({"backend": "tritn"}, ValueError, "backend: unknown backend 'tritn'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        functional.bias_act(**{"x": X, "bias": BIAS, **change})
    assert launch_counts() == {}
