"""Derivatives of any order, torch.func's transforms and forward-mode AD: what plain PyTorch can, with its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from fastvit import functional, reference
from fastvit.backend import launch_counts, use_backend
from fastvit.validation.tolerance import assert_close

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KEEP = [[0, 5, 5], [3, 2, 1]]
Call = Callable[..., Tensor]


def make_inputs(device: str, *, uint8: bool = False) -> list[Tensor]:
    """Images, weight, bias, positions (prefix row too), prefix."""
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8) if uint8 else torch.randn(2, 3, 8, 12)
    rest = torch.randn(16, 3, 4, 4) * 0.2, torch.randn(16), torch.randn(7, 16), torch.randn(1, 16)
    return [tensor.to(device) for tensor in (images, *rest)]


def embed(images: Tensor, weight: Tensor, bias: Tensor, table: Tensor, prefix: Tensor, **options: Any) -> Tensor:
    return functional.patch_embed(images, weight, bias, pos_embed=table, prefix=prefix, mean=MEAN, std=STD, **options)


def embed_plainly(
    images: Tensor, weight: Tensor, bias: Tensor, table: Tensor, prefix: Tensor, **options: Any
) -> Tensor:
    if images.dtype == torch.uint8:
        images = images.to(weight.dtype) / 255
    mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1) for values in (MEAN, STD)
    )
    return reference.patch_embed((images - mean) / std, weight, bias, pos_embed=table, prefix=prefix, **options)


def add(tokens: Tensor, table: Tensor, prefix: Tensor, **options: Any) -> Tensor:
    return functional.add_position(tokens, table, prefix=prefix, **options)


def add_plainly(tokens: Tensor, table: Tensor, prefix: Tensor, **options: Any) -> Tensor:
    return reference.add_position(tokens, table, prefix=prefix, **options)


def derivatives(function: Call, inputs: Sequence[Tensor], order: int, **options: Any) -> list[Tensor]:
    """Of all orders up to this one: each of a nonlinear function of those before, in every input."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    out = function(*leaves, **options)
    loss = out.to(wanted[0].dtype).pow(3).mean()
    found: list[Tensor] = [out]
    for _ in range(order):
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        found += grads
        loss = sum((part.square().mean() for part in grads), torch.zeros_like(loss))
    return found


def expect_plain_pytorchs(
    function: Call, plain: Call, inputs: list[Tensor], order: int, backend: str, **options: Any
) -> None:
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    found = derivatives(function, inputs, order, backend=backend, **options)
    others = derivatives(plain, inputs, order, **options), derivatives(plain, exact, order, **options)
    for number, three in enumerate(zip(found, *others, strict=True)):
        assert_close(*three, f"result {number}")


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "keep"])
def test_derivatives_up_to_the_third(backend: str, device: str, keep: Any, uint8: bool) -> None:
    kept = None if keep is None else torch.tensor(keep, device=device)
    expect_plain_pytorchs(embed, embed_plainly, make_inputs(device, uint8=uint8), 3, backend, keep=kept)
    counts = launch_counts()
    assert {name for _, name in counts} == {backend}
    # What is linear has derivatives by the op itself: two forwards and two backwards more, a second derivative.
    assert counts["patch_embed_backward", backend] > 1 < counts["patch_embed", backend]


def test_derivatives_of_add_position(backend: str, device: str) -> None:
    inputs = [torch.randn(2, 6, 16), torch.randn(7, 16), torch.randn(1, 16)]
    expect_plain_pytorchs(add, add_plainly, [x.to(device) for x in inputs], 3, backend)


@pytest.mark.parametrize("wanted", range(5), ids=["images", "weight", "bias", "table", "prefix"])
def test_a_gradients_gradient_where_few_are_wanted(backend: str, device: str, wanted: int) -> None:
    """The change comes as sums give it: one number, expanded."""
    results = []
    for function, options in ((embed, {"backend": backend}), (embed_plainly, {})):
        torch.manual_seed(0)
        inputs = make_inputs(device)
        inputs[wanted].requires_grad_()
        (first,) = torch.autograd.grad(function(*inputs, **options).pow(3).sum(), inputs[wanted], create_graph=True)
        results.append(torch.autograd.grad(first.sum(), inputs[wanted])[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_second_derivatives_under_autocast(backend: str, device: str) -> None:
    inputs = make_inputs(device)

    def cast(function: Call) -> Call:
        def run(*inputs: Tensor, **options: Any) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return function(*inputs, **options).to(torch.bfloat16)

        return run

    found = derivatives(cast(embed), inputs, 2, backend=backend)
    plain = derivatives(cast(embed_plainly), inputs, 2)
    truth = derivatives(embed_plainly, [x.double() for x in inputs], 2)
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 2 * allowed


def test_a_graph_of_gradients_has_the_same_gradients(backend: str, device: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(device)]
    graph, without = (
        torch.autograd.grad(embed(*inputs, backend=backend).square().sum(), inputs, create_graph=create_graph)
        for create_graph in (True, False)
    )
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(graph, without, strict=True))


def of_all(function: Call, inputs: list[Tensor]) -> Any:
    return grad(lambda *inputs: function(*inputs).pow(3).sum(), (0, 1, 2, 3, 4))(*inputs)


def of_each_sample(function: Call, inputs: list[Tensor]) -> Any:
    def loss(weights: Any, image: Tensor) -> Tensor:
        return function(image[None], *weights).pow(3).sum()

    return vmap(grad(loss), (None, 0))(inputs[1:], inputs[0])


def of_an_ensemble(function: Call, inputs: list[Tensor]) -> Any:
    weights = [torch.stack([x, 2 * x]) for x in inputs[1:]]
    return vmap(lambda *weights: function(inputs[0], *weights))(*weights)


def with_kept_patches(function: Call, inputs: list[Tensor]) -> Any:
    keep = torch.tensor(KEEP, device=inputs[0].device)
    return vmap(lambda image, keep: function(image[None], *inputs[1:], keep=keep[None]))(inputs[0], keep)


def with_a_module(function: Call, inputs: list[Tensor]) -> Any:
    class Embed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(inputs[1])

        def forward(self, images: Tensor) -> Tensor:
            return function(images, self.weight, *inputs[2:])

    module = Embed()
    return grad(lambda weight: functional_call(module, {"weight": weight}, (inputs[0],)).pow(3).sum())(2 * inputs[1])


def along(function: Call, inputs: list[Tensor]) -> Any:
    return jvp(function, tuple(inputs), tuple(x.cos() for x in inputs))


def with_dual_numbers(function: Call, inputs: list[Tensor]) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, x.cos()) for x in inputs]
        return forward_ad.unpack_dual(function(*duals)).tangent


def jacobian(function: Call, inputs: list[Tensor]) -> Any:
    return jacrev(lambda bias: function(*inputs[:2], bias, *inputs[3:]).square())(inputs[2])


def curvature(function: Call, inputs: list[Tensor]) -> Any:
    return hessian(lambda bias: function(*inputs[:2], bias, *inputs[3:]).pow(3).sum())(inputs[2])


TRANSFORMS = (
    of_all, of_each_sample, of_an_ensemble, with_kept_patches, with_a_module, along, with_dual_numbers, jacobian,
    curvature,
)  # fmt: skip


def runs_the_reference(
    transform: Callable[..., Any], ours: Call, plain: Call, inputs: list[Tensor], device: str
) -> None:
    """Under a transform, what plain PyTorch gives without a launch; or an error where a backend is forced."""
    found, expected = (torch.utils._pytree.tree_leaves(transform(f, inputs)) for f in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert launch_counts() == {}
    name = "cpu" if device == "cpu" else "triton"
    with use_backend(name), pytest.raises(RuntimeError, match=f"{name!r} does not work under torch.func .*'reference'"):
        transform(ours, inputs)


@pytest.mark.parametrize(
    ("transform", "uint8"),
    [
        pytest.param(transform, uint8, id=f"{transform.__name__}-{'uint8' if uint8 else 'float'}")
        for transform in TRANSFORMS
        for uint8 in (False, True)
        if not (uint8 and transform in (of_all, along, with_dual_numbers))  # which differentiate in the images
    ],
)
def test_transforms_run_the_reference_unless_a_backend_is_forced(
    transform: Callable[[Call, list[Tensor]], Any], uint8: bool, device: str
) -> None:
    inputs = make_inputs(device, uint8=uint8)
    runs_the_reference(transform, embed, embed_plainly, inputs, device)
    assert embed(*inputs).shape == (2, 7, 16) and launch_counts()  # and after it all is as before


def test_added_positions_under_transforms(device: str) -> None:
    tokens, table, prefix = (x.to(device) for x in (torch.randn(2, 6, 16), torch.randn(7, 16), torch.randn(1, 16)))

    def each(function: Call) -> Tensor:
        sample = grad(lambda table, tokens: function(tokens[None], table, prefix).pow(3).sum())
        return vmap(sample, (None, 0))(table, tokens)

    torch.testing.assert_close(each(add), each(add_plainly))
    assert launch_counts() == {}


def test_a_dual_level_without_dual_tensors_changes_nothing(backend: str, device: str) -> None:
    with forward_ad.dual_level(), use_backend(backend):
        embed(*make_inputs(device))
    assert launch_counts() == {("patch_embed", backend): 1}


@pytest.mark.parametrize("transform", [of_all, of_each_sample], ids=lambda function: function.__name__)
def test_transforms_compile(transform: Callable[[Call, list[Tensor]], Any], device: str) -> None:
    inputs = make_inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: transform(embed, list(inputs)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), tuple(transform(embed_plainly, inputs)), rtol=1e-5, atol=1e-5)
    assert launch_counts() == {}


def test_the_op_itself_refuses_to_be_batched(device: str, backend: str) -> None:
    images, weight, *_ = make_inputs(device)
    rest = (None,) * 6
    with pytest.raises(RuntimeError, match="can't be used under torch.vmap"):
        vmap(lambda x: torch.ops.fastvit.patch_embed(x[None], weight, *rest, torch.float32, torch.float32, backend))(
            images
        )
