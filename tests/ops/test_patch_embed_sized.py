"""patch_embed_packed of one tensor with its sizes in another: compiled once for all batches, and equal to the list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit import functional, grids
from tests.ops.test_patch_embed_packed import NORMALISATION, OPS, C, D, P, cut, make
from tests.ops.test_registration import CHECKS

OP = "patch_embed_packed"
# The first has as many images as nothing else has of anything, which torch would take for the same.
BATCHES = ([(2, 4), (4, 2), (6, 2), (2, 4), (2, 2)], [(2, 2)] * 7, [(4, 6), (2, 2)], [(2, 2), (6, 4), (4, 4)])
KINDS = ("pixels", "CPP", "PPC", "windows", "rows of positions")


def given(kind: str, device: str, sizes: list[tuple[int, int]], uint8: bool = False) -> tuple[dict[str, Any], Any]:
    """The call with one tensor, and the tensor of its sizes."""
    torch.manual_seed(len(sizes))
    t = make(device, sizes=sizes, uint8=uint8)
    images = t.pop("images")
    if kind == "rows of positions":
        t["pos_embed"] = torch.randn(sum(r * c for r, c in sizes), D, device=device, requires_grad=True)
    options: dict[str, Any] = dict(NORMALISATION)
    if kind in ("pixels", "rows of positions"):
        tensor = torch.cat(
            [
                torch.empty(0, dtype=torch.uint8 if uint8 else torch.float32, device=device),
                *(image.flatten() for image in images),
            ]
        )
    else:
        options |= {"order": "PPC"} if kind == "PPC" else {"merge": 2} if kind == "windows" else {}
        tensor = torch.cat(cut(images, "PPC" if kind == "PPC" else "CPP"))
    return {"images": tensor, **t, **options}, torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)


def leaves(call: dict[str, Any]) -> list[Tensor]:
    return [value for value in call.values() if isinstance(value, Tensor) and value.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_for_all_batches(backend: str, device: str, kind: str) -> None:
    """Of several numbers of images, sizes and tokens, outputs and every gradient, patch_embed_packed's of the list."""
    graphs = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(functional.patch_embed_packed, fullgraph=True, dynamic=True, backend=graphs)
    for sizes in BATCHES:
        call, listed = given(kind, device, sizes)
        call["images"].requires_grad_()
        with torch.compiler.set_stance("fail_on_recompile" if sizes is not BATCHES[0] else "default"):
            tokens, offsets = compiled(**call, sizes=listed, backend=backend)
        expected, same_offsets = functional.patch_embed_packed(**call, sizes=sizes, backend=backend)
        assert torch.equal(offsets, same_offsets)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
        grad = torch.randn_like(tokens)
        ours = torch.autograd.grad(tokens, leaves(call), grad)
        theirs = torch.autograd.grad(expected, leaves(call), grad)
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


def test_compiled_by_inductor_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """uint8 pixels, forward and backward through torch's own compiler, in a program that does more."""
    # A program that is kept on disk may be of another version of the op.
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)

    def loss(images: Tensor, sizes: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        tokens, offsets = functional.patch_embed_packed(
            images, weight, sizes=sizes, pos_embed=positions, **NORMALISATION
        )
        return (tokens.tanh().cumsum(0)[offsets[1:] - 1]).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for sizes in BATCHES:
        call, listed = given("pixels", device, sizes, uint8=True)
        arguments = call["images"], listed, call["weight"], call["pos_embed"]
        with torch.compiler.set_stance("fail_on_recompile" if sizes is not BATCHES[0] else "default"):
            ours = torch.autograd.grad(compiled(*arguments), arguments[2:])
        for own, other in zip(ours, torch.autograd.grad(loss(*arguments), arguments[2:]), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("traced", [False, True], ids=["a parameter", "compiled"])
def test_a_second_derivative_is_refused(device: str, traced: bool) -> None:
    """Where none is known; torch would take it for zero."""
    call, sizes = given("pixels", device, BATCHES[0])
    torch._dynamo.reset()
    run = torch.compile(functional.patch_embed_packed, backend="eager") if traced else functional.patch_embed_packed
    tokens, _ = run(**call, sizes=sizes if traced else torch.nn.Parameter(sizes, requires_grad=False))
    grad = torch.randn_like(tokens, requires_grad=True)
    (first,) = torch.autograd.grad(tokens, call["weight"], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="sizes: .* can be differentiated once; give Python numbers"):
        first.square().sum().backward()


@pytest.mark.parametrize("sizes", [BATCHES[0], []], ids=["images", "none"])
def test_gradients_of_transposed_patches(backend: str, device: str, sizes: list[tuple[int, int]]) -> None:
    """They have no gaps and no order of their own, which the compiler is told before it knows them."""
    call, listed = given("CPP", device, BATCHES[0])
    images = call["images"][: len(sizes) * 8].t().contiguous().t()
    rest = ("CPP", False, 1, "bicubic", True, None, None, None, torch.float32, 2, [3, 2, D], (True,) * 4, backend)
    grad = torch.randn(len(images) + 2 * len(sizes), D, device=device)
    tensors = grad, call["weight"].detach(), images, listed[: len(sizes)]
    torch.library.opcheck(OPS.patch_embed_sized_backward.default, (*tensors, *rest), test_utils=CHECKS)


@pytest.mark.parametrize("kind", ["pixels", "rows of positions"])
def test_positions_are_not_kept(device: str, kind: str) -> None:
    """For the backward pass, which needs their shape alone: they may be written over, and their memory is free."""
    call, sizes = given(kind, device, BATCHES[0])
    torch._dynamo.reset()
    compiled = torch.compile(functional.patch_embed_packed, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens, _ = compiled(**call, sizes=sizes)
    expected, _ = functional.patch_embed_packed(**call, sizes=BATCHES[0])
    grad = torch.randn_like(tokens)
    with torch.no_grad():
        call["pos_embed"].zero_()
    for own, other in zip(*(torch.autograd.grad(each, leaves(call), grad) for each in (tokens, expected)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_a_tensor_of_sizes_is_the_numbers(backend: str, device: str) -> None:
    """Where nothing is compiled; of no images too."""
    for kind, sizes in (*((kind, BATCHES[0]) for kind in KINDS), ("pixels", []), ("rows of positions", [])):
        call, listed = given(kind, device, sizes)
        by_tensor = functional.patch_embed_packed(**call, sizes=listed, backend=backend)
        by_numbers = functional.patch_embed_packed(**call, sizes=sizes, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(by_tensor, by_numbers, strict=True))


def test_pixels_are_the_list(backend: str, device: str) -> None:
    t = make(device, uint8=True)
    tokens, offsets = functional.patch_embed_packed(**t, **NORMALISATION, backend=backend)
    pixels, sizes = torch.cat([image.flatten() for image in t["images"]]), [(2, 3), (1, 1), (3, 2), (2, 3)]
    t["images"] = pixels
    again, same_offsets = functional.patch_embed_packed(**t, sizes=sizes, **NORMALISATION, backend=backend)
    torch.testing.assert_close(again, tokens, rtol=0, atol=0)
    assert torch.equal(offsets, same_offsets)


@pytest.mark.parametrize("still", [False, True], ids=["clip", "still"])
def test_frames(backend: str, device: str, still: bool) -> None:
    """Of a weight [D, C, T, P, P], and of gradients that other frames of a still don't have."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(functional.patch_embed_packed, fullgraph=True, dynamic=True, backend=graphs)
    for sizes in BATCHES:
        patches = torch.randn(sum(r * c for r, c in sizes), C * 2 * P * P, device=device, requires_grad=True)
        weight = torch.randn(D, C, 2, P, P, device=device, requires_grad=True)
        options: dict[str, Any] = {"still": still, "backend": backend, **NORMALISATION}
        tokens, _ = compiled(patches, weight, sizes=torch.tensor(sizes), **options)
        expected, _ = functional.patch_embed_packed(patches, weight, sizes=sizes, **options)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
        grad = torch.randn_like(tokens)
        ours, theirs = (torch.autograd.grad(out, (patches, weight), grad) for out in (tokens, expected))
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("kind", ["pixels", "windows", "rows of positions"])
def test_opcheck(backend: str, device: str, kind: str) -> None:
    call, sizes = given(kind, device, BATCHES[0])
    images, weight, table = call["images"].requires_grad_(), call["weight"], call["pos_embed"]
    layout = ("CPP", False, 2 if kind == "windows" else 1, "bicubic", True, None)
    values = 1 if kind != "windows" else P * P
    means, stds = ([v for v in NORMALISATION[name] for _ in range(values)] for name in ("mean", "std"))
    rest = (*layout, means, stds, torch.float32)
    arguments = (weight, call["bias"], table, call["prefix"], images, sizes, *rest, torch.float32, backend)
    torch.library.opcheck(OPS.patch_embed_sized.default, arguments, test_utils=CHECKS)
    grad = torch.randn(OPS.patch_embed_sized(*arguments)[0].shape, device=device)
    detached = weight.detach(), images.detach()
    for needs in ((True,) * 4, (False, True, False, False)):
        arguments = (grad, *detached, sizes, *rest, 2, list(table.shape), needs, backend)
        torch.library.opcheck(OPS.patch_embed_sized_backward.default, arguments, test_utils=CHECKS)


def test_values_of_a_gpu_are_never_waited_for(backend: str) -> None:
    with FakeTensorMode():
        call, sizes = given("pixels", "cpu", BATCHES[0])
        tokens, offsets = functional.patch_embed_packed(**call, sizes=sizes, backend=backend)
        assert tokens.shape == (40 + 5 * 2, D) and offsets.shape == (6,)
        tokens.sum().backward()
        assert call["weight"].grad is not None and call["weight"].grad.shape == (D, C, P, P)


def test_flops(device: str) -> None:
    call, sizes = given("pixels", device, BATCHES[0])
    with FlopCounterMode(display=False) as counter, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        functional.patch_embed_packed(**call, sizes=mode.from_tensor(sizes))[0].sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 40 * D * C * P * P)


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("gathers", [False, True])
def test_gradients_of_resampled_positions(device: str, gathers: bool, merge: int, monkeypatch: Any) -> None:
    """By products, and by the sums that a GPU makes for many sizes: what autograd finds."""
    monkeypatch.setattr(grids, "_is_gathered", lambda *_: gathers)
    table = torch.randn(4, 6, 5, device=device, requires_grad=True)
    sizes = [(2, 4), (4, 6), (2, 4), (6, 2)]
    rows, starts = grids.grid_rows(table, sizes, merge=merge)
    assert (starts, len(rows)) == grids.grid_starts(sizes)
    grad = torch.randn_like(rows)
    (expected,) = torch.autograd.grad(rows, table, grad)
    found = grids.grid_rows_gradient(grad, (4, 6), sizes, merge=merge)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_traced_by_torchscript(device: str) -> None:
    """For all sizes, and not at all from those that a trace would keep."""
    call, sizes = given("pixels", device, [(2, 4), (4, 2)])
    images = call.pop("images")
    call = {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()}

    def embed(images: Tensor, sizes: Any) -> tuple[Tensor, Tensor]:
        return functional.patch_embed_packed(images, sizes=sizes, **call)

    traced = torch.jit.trace(embed, (images, sizes), check_trace=False)
    for others in ([(4, 2), (2, 4)], [(1, 3)], [(2, 2), (1, 1), (3, 5)]):
        pixels = given("pixels", device, others)[0]["images"]
        for own, other in zip(traced(pixels, torch.tensor(others)), embed(pixels, others), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="images, sizes: torch.jit.trace would keep the sizes"):
        torch.jit.trace(lambda images: embed(images, [(2, 4), (4, 2)]), (images,), check_trace=False)
    with pytest.raises(RuntimeError, match="images, sizes: torch.jit.trace would keep the sizes"):
        torch.jit.trace(lambda image: embed([image], None), (torch.zeros(C, P, P, device=device),), check_trace=False)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sizes": torch.tensor([[2, 2], [2, 3]])}, ValueError, "sizes: 10 patches in all, but images has 8"),
    ({"sizes": torch.tensor([[2, 2], [0, 4]])}, ValueError, "sizes: 0 must be at least 1"),
    ({"sizes": torch.tensor([[2, 2, 1]])}, ValueError, r"sizes: expected \[B, 2\], rows and columns, got \[1, 3\]"),
    ({"sizes": torch.tensor([[2.0, 2.0]])}, TypeError, "sizes: dtype"),
    ({"sizes": torch.tensor([[2, 4]]), "images": torch.zeros(1, 8, 48)}, ValueError,
     "sizes: a tensor is for images behind each other; with padded patches give Python numbers"),
    ({"images": torch.zeros(8, 48), "sizes": torch.tensor([[2, 2], [1, 4]]), "merge": 2}, ValueError,
     r"sizes\[1\]: 1 x 4 patches are not whole windows of merge=2"),
    ({"images": torch.zeros(8 * 48 + 1)}, ValueError, "images: 385 pixels are no whole patches of 48"),
    ({"merge": 2}, ValueError, "still, merge: of patches that are cut already alone"),
    ({"weight": torch.zeros(D, C, 2, P, P)}, ValueError, "images: pixels .* have no frames, but weight has"),
]  # fmt: skip


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], message: str, traced: bool) -> None:
    """Also those that only the running program can see."""
    torch._dynamo.reset()
    call = torch.compile(functional.patch_embed_packed, backend="eager") if traced else functional.patch_embed_packed
    arguments = {"images": torch.zeros(8 * 48), "weight": torch.zeros(D, C, P, P), "sizes": torch.tensor([[2, 2]] * 2)}
    with pytest.raises(kind, match=message):
        call(**{**arguments, **change})


def test_plain_pytorch_knows_no_sizes_that_are_a_tensor(device: str) -> None:
    call, listed = given("pixels", device, BATCHES[0])
    with (
        FakeTensorMode() as mode,
        pytest.raises(RuntimeError, match="sizes: compiled as a tensor, they are known to no"),
    ):
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        functional.patch_embed_packed(**fake, sizes=mode.from_tensor(listed), backend="reference")
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="'reference', which also serves float64"):
        fake = {name: mode.from_tensor(v).double() if isinstance(v, Tensor) else v for name, v in call.items()}
        functional.patch_embed_packed(**fake, sizes=mode.from_tensor(listed))
    torch._dynamo.reset()
    tokens, _ = torch.compile(functional.patch_embed_packed, backend="eager")(  # in parts
        **call, sizes=listed, backend="reference"
    )
    expected, _ = functional.patch_embed_packed(**call, sizes=BATCHES[0], backend="reference")
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
