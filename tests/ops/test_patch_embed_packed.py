"""patch_embed_packed: what torch expects of an op, the ops that it stands for, derivatives of any order, wrong
arguments, and no wait."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastvit import functional, reference
from fastvit.backend import launch_counts
from fastvit.grids import resample_grids
from fastvit.validation.tolerance import relative_error
from tests.ops import test_derivatives as of_any_order
from tests.ops.test_registration import CHECKS

OP = "patch_embed_packed"
OPS = torch.ops.fastvit
SIZES = [(2, 3), (1, 1), (3, 2), (2, 3)]
D, C, P = 24, 3, 4
NORMALISATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}


def make(device: str, *, uint8: bool = False, sizes: list[tuple[int, int]] = SIZES) -> dict[str, Any]:
    def image(rows: int, columns: int) -> Tensor:
        shape = (C, rows * P, columns * P)
        drawn = torch.randint(256, shape, dtype=torch.uint8) if uint8 else torch.randn(shape)
        return drawn.to(device)

    tensors = {"weight": torch.randn(D, C, P, P), "bias": torch.randn(D), "pos_embed": torch.randn(3, 2, D)}
    tensors["prefix"] = torch.randn(2, D)
    leaves = {name: tensor.to(device).requires_grad_() for name, tensor in tensors.items()}
    return {"images": [image(*size) for size in sizes], **leaves}


def cut(images: list[Tensor], order: str) -> list[Tensor]:
    """[N_i, C·P·P] of each, as processors cut them."""
    grids = [image.unflatten(2, (-1, P)).unflatten(1, (-1, P)) for image in images]  # [C, r, P, c, P]
    places = (1, 3, 0, 2, 4) if order == "CPP" else (1, 3, 2, 4, 0)
    return [grid.permute(places).flatten(2).flatten(0, 1) for grid in grids]


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_opcheck(backend: str, device: str, uint8: bool) -> None:
    t = make(device, uint8=uint8)
    images = [image.requires_grad_(not uint8) for image in t["images"]]
    table, starts = t["pos_embed"].detach().flatten(0, 1).requires_grad_(), [0, 5, 0, 0]
    rest = (*NORMALISATION.values(), torch.float32)
    arguments = (t["weight"], t["bias"], table, t["prefix"], images, starts, *rest, torch.float32, backend)
    torch.library.opcheck(OPS.patch_embed_packed.default, arguments, test_utils=CHECKS)
    grad = torch.randn(OPS.patch_embed_packed(*arguments).shape, device=device)
    plain = [image.detach() for image in images]
    for needs in ([not uint8, True, True, True], [False, False, True, False]):
        settings = (starts, *rest, 2, 6, needs, backend)
        for given in ((grad, t["weight"].detach(), plain), (grad.clone().requires_grad_(), t["weight"], images)):
            torch.library.opcheck(OPS.patch_embed_packed_backward.default, (*given, *settings), test_utils=CHECKS)


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_it_is_that_of_each_image(backend: str, device: str, uint8: bool) -> None:
    t = make(device, uint8=uint8)
    tokens, offsets = functional.patch_embed_packed(**t, **NORMALISATION, backend=backend)
    assert offsets.tolist() == [0, 8, 11, 19, 27] and offsets.dtype == torch.int32
    leaves = [t[name] for name in ("weight", "bias", "pos_embed", "prefix")]
    grad = torch.randn_like(tokens)
    found = torch.autograd.grad(tokens, leaves, grad)
    one_by_one = [
        functional.patch_embed(
            image[None], t["weight"], t["bias"], pos_embed=resample_grids(t["pos_embed"], [size]),
            prefix=t["prefix"], **NORMALISATION, backend=backend,
        )[0]
        for image, size in zip(t["images"], SIZES, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(tokens, torch.cat(one_by_one), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(torch.cat(one_by_one), leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    counts = launch_counts()
    assert counts["patch_embed_packed", backend] == counts["patch_embed_packed_backward", backend] == 1


@pytest.mark.parametrize("order", ["CPP", "PPC"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_cut_patches_are_the_images(backend: str, device: str, order: str, padded: bool) -> None:
    t = make(device)
    expected, offsets = functional.patch_embed_packed(**t, **NORMALISATION, backend=backend)
    rows = cut(t.pop("images"), order)
    patches = torch.cat(rows)
    if padded:
        patches = torch.full((len(rows), 9, C * P * P), torch.nan, device=device)
        for place, own in zip(patches, rows, strict=True):
            place[: len(own)] = own
    options = {"sizes": SIZES, "order": order, "backend": backend, **NORMALISATION}
    tokens, same_offsets = functional.patch_embed_packed(patches, **t, **options)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(offsets, same_offsets)


@pytest.mark.parametrize("still", [False, True], ids=["clip", "still"])
def test_frames_are_a_convolution_over_time(backend: str, device: str, still: bool) -> None:
    """Patches [N, C·T·P·P] and a weight as Qwen2-VL's: those of its Conv3d, of stills by one frame of each."""
    frames, sizes = 2, [(2, 4), (6, 2)]
    patches = torch.randn(20, C, frames, P, P, device=device)
    if still:
        patches[:, :, 1] = patches[:, :, 0]
    weight = torch.randn(D, C, frames, P, P, device=device, requires_grad=True)
    expected = F.conv3d(patches, weight).flatten(1)
    read = patches.clone()
    if still:
        read[:, :, 1] = torch.nan
    tokens, _ = functional.patch_embed_packed(read.flatten(1), weight, sizes=sizes, still=still, backend=backend)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(tokens)
    ours, theirs = (torch.autograd.grad(out, weight, grad)[0] for out in (tokens, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_positions_of_patches_in_windows(backend: str, device: str) -> None:
    sizes, merge = [(4, 6), (2, 2), (6, 4)], 2
    t = make(device, sizes=sizes)
    images, table = t.pop("images"), t["pos_embed"]
    in_rows, offsets = functional.patch_embed_packed(torch.cat(cut(images, "CPP")), **t, sizes=sizes, backend=backend)

    def windows(rows: Tensor, size: tuple[int, int]) -> Tensor:
        grid = rows.unflatten(0, size)
        return torch.stack([
            grid[top + y, left + x]
            for top in range(0, size[0], merge) for left in range(0, size[1], merge)
            for y in range(merge) for x in range(merge)
        ])  # fmt: skip

    patches = [windows(own, size) for own, size in zip(cut(images, "CPP"), sizes, strict=True)]
    options = {"sizes": sizes, "merge": merge, "backend": backend}
    tokens, _ = functional.patch_embed_packed(torch.cat(patches), **t, **options)
    expected = [
        torch.cat([own[:2], windows(own[2:], size)])
        for own, size in zip(in_rows.split([2 + r * c for r, c in sizes]), sizes, strict=True)
    ]
    torch.testing.assert_close(tokens, torch.cat(expected), rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), table)[0] for out in (tokens, torch.cat(expected)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_has_a_gradient(backend: str, device: str) -> None:
    t = make(device)
    first, *others = t["images"]
    first.requires_grad_()
    tokens, _ = functional.patch_embed_packed(**t, backend=backend)
    tokens.sum().backward()
    assert first.grad is not None and first.grad.shape == first.shape and all(each.grad is None for each in others)
    tokens, _ = functional.patch_embed_packed(t["images"], t["weight"].detach(), bias=t["bias"], backend=backend)
    (d_bias,) = torch.autograd.grad(tokens.sum(), t["bias"])
    torch.testing.assert_close(d_bias, torch.full_like(d_bias, 19))


def test_no_images(backend: str, device: str) -> None:
    t = make(device, sizes=[])
    tokens, offsets = functional.patch_embed_packed(**t, backend=backend)
    assert tokens.shape == (0, D) and offsets.tolist() == [0]
    (first,) = torch.autograd.grad(tokens.square().sum(), t["weight"], create_graph=True)
    assert first.eq(0).all() and torch.autograd.grad(first.square().sum(), t["weight"])[0].eq(0).all()


def embed(weight: Tensor, bias: Tensor, table: Tensor, prefix: Tensor, *images: Tensor, **options: Any) -> Tensor:
    """The tokens: by the library where a backend is named, None for its choice; else by plain PyTorch."""
    run = functional.patch_embed_packed if "backend" in options else reference.patch_embed_packed
    given = list(images) if "sizes" not in options else images[0]
    return run(given, weight, bias, pos_embed=table, prefix=prefix, **NORMALISATION, **options)[0]


def tensors(device: str, **options: Any) -> list[Tensor]:
    """As `embed` takes them."""
    t = make(device, **options)
    return [*(t[name].detach() for name in ("weight", "bias", "pos_embed", "prefix")), *t["images"]]


def expect_plain_pytorchs(inputs: list[Tensor], order: int, backend: str, **options: Any) -> None:
    of_any_order.expect_plain_pytorchs(embed, embed, inputs, order, backend, **options)


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("form", ["grid", "rows", "cut"])
def test_derivatives_up_to_the_third(backend: str, device: str, form: str, uint8: bool) -> None:
    inputs, options = tensors(device, uint8=uint8), {}
    if form == "rows":
        inputs[2] = torch.randn(19, D, device=device)
    elif form == "cut":
        inputs[4:], options = [torch.cat(cut(inputs[4:], "CPP"))], {"sizes": SIZES}
    expect_plain_pytorchs(inputs, 3, backend, **options)
    counts = launch_counts()
    assert {name for _, name in counts} == {backend}
    assert counts["patch_embed_packed_backward", backend] > 1 < counts["patch_embed_packed", backend]


WANTED = {"weight": 0, "bias": 1, "table": 2, "prefix": 3, "first image": 4, "last image": 7}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_a_gradients_gradient_where_few_are_wanted(backend: str, device: str, wanted: int) -> None:
    """The change comes as sums give it: one number, expanded; and only one of the images has one."""
    results = []
    for options in ({"backend": backend}, {}):
        torch.manual_seed(0)
        inputs = tensors(device)
        inputs[wanted].requires_grad_()
        (first,) = torch.autograd.grad(embed(*inputs, **options).pow(3).sum(), inputs[wanted], create_graph=True)
        results.append(torch.autograd.grad(first.sum(), inputs[wanted])[0])
    assert relative_error(*results) <= 1e-5


def _negative(found: Any) -> Any:
    return [_negative(each) for each in found] if isinstance(found, list) else None if found is None else -found


def _wrong_sign(run: Callable[..., Any], *arguments: Any) -> Any:
    return tuple(_negative(each) for each in run(*arguments))


def _an_image_skipped(run: Callable[..., Any], *arguments: Any) -> Any:
    *before, of_images, of_others, tokens, gradients = arguments
    if of_images is not None:
        of_images = [*of_images[:-1], torch.zeros_like(of_images[-1])]
    return run(*before, of_images, of_others, tokens, gradients)


def _positions_off_by_one(run: Callable[..., Any], *arguments: Any) -> Any:
    *before, (of_weight, of_bias, of_rows), tokens, gradients = arguments
    if of_rows is not None:
        of_rows = torch.cat([of_rows[:2], of_rows[2:].roll(1, 0)])
    return run(*before, (of_weight, of_bias, of_rows), tokens, gradients)


def _images_have_an_offset(run: Callable[..., Any], *arguments: Any) -> Any:
    *before, tokens, gradients = arguments
    return run(*before, lambda *given: tokens(*given[:-1], NORMALISATION["mean"]), gradients)


@pytest.mark.parametrize("fault", [_wrong_sign, _an_image_skipped, _positions_off_by_one, _images_have_an_offset])
def test_faults_in_second_derivatives_are_found(
    backend: str, device: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fastvit.ops.patch_embed_packed")  # the package's attribute is the op itself
    run = module.second_gradients
    monkeypatch.setattr(module, "second_gradients", lambda *arguments: fault(run, *arguments))
    with pytest.raises(AssertionError, match="result .*error"):
        expect_plain_pytorchs(tensors(device), 2, backend)


def test_second_derivatives_under_autocast(backend: str, device: str) -> None:
    def cast(*inputs: Tensor, **options: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return embed(*inputs, **options).to(torch.bfloat16)

    inputs = tensors(device)
    found = of_any_order.derivatives(cast, inputs, 2, backend=backend)
    plain = of_any_order.derivatives(cast, inputs, 2)
    truth = of_any_order.derivatives(embed, [x.double() for x in inputs], 2)
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
        assert error <= 2 * allowed


@pytest.mark.parametrize("rows", [False, True], ids=["grid", "rows"])
def test_gradcheck_through_the_reference(rows: bool) -> None:
    inputs = [tensor.double() for tensor in tensors("cpu", sizes=[(2, 1), (1, 3)])]
    if rows:
        inputs[2] = torch.randn(5, D, dtype=torch.float64)
    given = tuple(tensor.requires_grad_() for tensor in inputs)

    def run(*given: Tensor) -> Tensor:
        return embed(*given, backend=None)

    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def embed_batch(images: Tensor, weight: Tensor, bias: Tensor, table: Tensor, prefix: Tensor, **options: Any) -> Tensor:
    """Of the inputs of patch_embed, whose images are cut to sizes of their own."""
    cropped = [image[:, : 8 - 4 * number] for number, image in enumerate(images)]
    return embed(weight, bias, table[1:].unflatten(0, (2, 3)), prefix, *cropped, **options)


TRANSFORMS = [transform for transform in of_any_order.TRANSFORMS if transform is not of_any_order.with_kept_patches]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda function: function.__name__)
def test_transforms_run_the_reference_unless_a_backend_is_forced(transform: Callable[..., Any], device: str) -> None:
    def ours(*inputs: Tensor) -> Tensor:
        return embed_batch(*inputs, backend=None)

    of_any_order.runs_the_reference(transform, ours, embed_batch, of_any_order.make_inputs(device), device)


@pytest.mark.parametrize("transform", TRANSFORMS[:2], ids=lambda function: function.__name__)
def test_transforms_compile(transform: Callable[..., Any], device: str) -> None:
    def ours(*inputs: Tensor) -> Any:
        return transform(lambda *inputs: embed_batch(*inputs, backend=None), list(inputs))

    inputs = of_any_order.make_inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), tuple(transform(embed_batch, inputs)), rtol=1e-5, atol=1e-5)
    assert launch_counts() == {}


def test_values_are_never_waited_for(backend: str) -> None:
    # Of a fake tensor no value can be read, as one of a GPU can't without waiting for it.
    with FakeTensorMode():
        t = make("cpu", uint8=True)
        tokens, offsets = functional.patch_embed_packed(**t, **NORMALISATION, backend=backend)
        assert tokens.shape == (27, D) and offsets.shape == (5,)
        tokens.sum().backward()


def test_a_gpu_is_never_waited_for(backend: str, device: str) -> None:
    """Also not for what the host copies to it: offsets, the table of images, and what positions are made of."""
    if device != "cuda":
        pytest.skip("only a GPU runs beside the host")
    t = make(device, uint8=True)
    for mode in ("default", "error"):  # the first call loads kernels and constants
        torch.cuda.set_sync_debug_mode(mode)
        try:
            functional.patch_embed_packed(**t, **NORMALISATION, backend=backend)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_whole_and_once_for_all_sizes(backend: str, device: str) -> None:
    counter = CompileCounter()

    def embed(images: list[Tensor], weight: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return functional.patch_embed_packed(images, weight, pos_embed=positions, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend=counter)
    for sizes in (SIZES, [(5, 2), (3, 4), (2, 6), (4, 4)], [(3, 5), (6, 2), (5, 7), (2, 4)]):
        t = make(device, sizes=sizes)
        given = t["images"], t["weight"], torch.randn(sum(r * c for r, c in sizes), D, device=device)
        torch.testing.assert_close(compiled(*given), embed(*given))
    assert counter.frame_count <= 2  # an image of a single patch is one of its own kind


def test_flops_are_those_of_the_convolutions(device: str) -> None:
    t = make(device)
    with FlopCounterMode(display=False) as counter:
        functional.patch_embed_packed(**t)[0].sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 19 * D * C * P * P)  # forward, and the weight's gradient


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"images": torch.randn(2, C, 8, 8)}, TypeError, r"images: expected a list of \[C, H, W\] tensors, got Tensor"),
    ({"images": [torch.randn(C, 8, 8), None]}, TypeError, r"images\[1\]: expected a torch.Tensor, got NoneType"),
    ({"images": [torch.randn(1, C, 8, 8)]}, ValueError, r"images\[0\]: expected 3 dimensions \[C, H, W\], got 4"),
    ({"images": [torch.randn(C, 8, 8), torch.randn(1, 8, 8)]}, ValueError, r"images\[1\]: 1 channels, but weight"),
    ({"images": [torch.randn(C, 8, 8), torch.randn(C, 8, 3)]}, ValueError,
     r"images\[1\]: width 3 is not a positive multiple of the patch width 4"),
    ({"images": [torch.randn(C, 8, 8), torch.zeros(C, 8, 8, dtype=torch.uint8)]}, TypeError,
     r"images\[1\]: dtype torch.uint8, but images\[0\] has torch.float32"),
    ({"images": [torch.randn(C, 8, 8, device="meta")]}, ValueError, r"images\[0\]: on device meta, but weight is on"),
    ({"pos_embed": torch.randn(1, 5, 6, D)}, ValueError, r"pos_embed: expected a grid \[rows, columns, 24\] or a row"),
    ({"pos_embed": torch.randn(7, D)}, ValueError, r"or a row a patch \[4, 24\], got \[7, 24\]"),
    ({"pos_embed": torch.randn(2, 3, D), "interpolation": "cubic"}, ValueError, "interpolation: 'cubic' is not one of"),
    ({"images": torch.randn(4, 48), "sizes": [(2, 3)]}, ValueError, "sizes: 6 patches in all, but images has 4"),
    ({"images": torch.randn(2, 4, 48), "sizes": [(2, 2), (1, 5)]}, ValueError,
     r"sizes\[1\]: 5 patches, but images has 4 of each"),
    ({"images": torch.randn(2, 4, 48), "sizes": [(2, 2)]}, ValueError, "sizes: 1 of them, but images has 2"),
    ({"images": torch.randn(4, 47), "sizes": [(2, 2)]}, ValueError, r"or patches \[N, 48\] or \[B, N, 48\], where"),
    ({"images": torch.randn(4, 48), "sizes": torch.empty(1, 2, dtype=torch.int64, device="meta")}, TypeError,
     "sizes: a tensor on meta, not on the host; of a tensor take .tolist"),
    ({"images": torch.randn(4, 48), "sizes": [(2, 2.0)]}, TypeError, "sizes: expected whole numbers of Python"),
    ({"images": torch.randn(4, 48), "sizes": [(2, 2)], "order": "CP"}, ValueError, "order: unknown 'CP'; known: CPP"),
    ({"images": torch.randn(4, 96), "weight": torch.randn(D, C, 2, P, P), "sizes": [(2, 2)], "order": "PPC"},
     ValueError, "order: of patches with frames it is CPP, not PPC"),
    ({"images": torch.randn(4, 48), "weight": torch.randn(D, C, 2, P, P), "sizes": [(2, 2)]}, ValueError,
     r"or patches \[N, 96\] or \[B, N, 96\], where"),
    ({"weight": torch.randn(D, C, 2, P, P)}, ValueError, r"weight: expected 4 dimensions \[D, C, P_h, P_w\], got 5"),
    ({"images": torch.randn(4, 48), "sizes": [(2, 2)], "still": True}, ValueError, "still: weight has no frames"),
    ({"still": True}, ValueError, "still, merge: of patches that are cut already, with sizes, alone"),
    ({"merge": 2}, ValueError, "still, merge: of patches that are cut already, with sizes, alone"),
    ({"images": torch.randn(10, 48), "sizes": [(2, 2), (2, 3)], "merge": 2}, ValueError,
     r"sizes\[1\]: 2 x 3 patches are not whole windows of merge=2"),
    ({"images": torch.randn(4, 48), "sizes": [(2, 2)], "merge": 0}, ValueError, "merge: 0 must be at least 1"),
    ({"mean": (0.5,) * 2, "std": (0.5,) * 3}, ValueError, "mean: 2 values, expected 3"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:48] for _, _, message in WRONG])
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"images": [torch.randn(C, 8, 8)], "weight": torch.randn(D, C, P, P), **change}
    with pytest.raises(kind, match=message):
        functional.patch_embed_packed(given.pop("images"), given.pop("weight"), **given)
