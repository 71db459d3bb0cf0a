"""The CUDA kernels of patch_embed, emulated: by the validator's rule, and what it does not vary."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import functional
from fastvit.emulated import ops
from fastvit.emulated.call import bank_conflicts, emulation
from fastvit.validation import Inputs, PatchEmbedCase, make_inputs
from fastvit.validation.cases import DTYPES
from fastvit.validation.ops.patch_embed import OP
from fastvit.validation.runner import backend_candidate, check_inputs
from fastvit.validation.tolerance import relative_error

HOPPER: dict[str, Any] = {"capability": 90, "processors": 1}
LARGE: dict[str, Any] = {"processors": 1}


def hold(inputs: Inputs, gradients: int = 4, op: str = "patch_embed") -> None:
    """Forward and every gradient by the rule that every backend is held to."""
    bank_conflicts()
    rows = check_inputs(backend_candidate("emulated"), op, inputs)
    assert [row for row in rows if row.status != "passed"] == []
    assert len(rows) > gradients
    assert bank_conflicts() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OP.tiny, ids=lambda case: case.name)
def test_every_case(case: PatchEmbedCase, dtype: str) -> None:
    hold(make_inputs(case, DTYPES[dtype]), gradients=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("images", ["uint8", "same", "float16"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_any_number_of_steps(steps: int, images: str, layout: str, dtype: str) -> None:
    """K of 1 to 7 tiles or twice that: fewer than there are stages, as many, and every remainder."""
    case = PatchEmbedCase("steps", patch=(8, 4), channels=steps, grid=(3, 3), width=72, images=images, layout=layout,
                          normalise=True, keep=5)  # fmt: skip
    hold(make_inputs(case, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", [{}, LARGE, HOPPER], ids=["small", "large", "hopper"])
@pytest.mark.parametrize("images", ["uint8", "same", "float32"])
def test_more_rows_and_columns_than_a_tile(images: str, device: dict[str, Any], dtype: str) -> None:
    case = PatchEmbedCase("tiles", batch=7, grid=(5, 6), patch=(8, 8), channels=4, width=200, prefix=2, images=images,
                          normalise=True)  # fmt: skip
    with emulation(**device):
        hold(make_inputs(case, DTYPES[dtype]))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_any_number_of_steps_of_large_tiles(steps: int) -> None:
    case = PatchEmbedCase("steps", batch=1, patch=(8, 8), channels=steps, grid=(2, 3), width=144, keep=4)
    for device in (LARGE, HOPPER):
        with emulation(**device):
            hold(make_inputs(case, torch.bfloat16))


@pytest.mark.parametrize("images", ["uint8", "same", "float32"])
@pytest.mark.parametrize(("steps", "batch", "processors"), [(1, 7, 1), (2, 13, 1), (3, 7, 1), (3, 13, 4), (5, 6, 3)])
def test_a_cluster_multiplies_tile_after_tile(steps: int, batch: int, processors: int, images: str) -> None:
    """One to three tiles of rows, in pairs, by two of columns, by one pair of blocks or by two; of fewer steps than
    there are stages, and of more."""
    case = PatchEmbedCase("stream", batch=batch, patch=(8, 8), channels=steps, grid=(5, 6), width=200, images=images,
                          prefix=1)  # fmt: skip
    with emulation(capability=90, processors=processors):
        hold(make_inputs(case, torch.bfloat16), gradients=1)


@pytest.mark.parametrize("rows", [1, 300])
def test_prefixes_of_many_tiles(rows: int) -> None:
    case = PatchEmbedCase("prefix", batch=2, patch=(8, 8), channels=3, grid=(5, 6), width=200, prefix=rows)
    with emulation(**HOPPER):
        hold(make_inputs(case, torch.bfloat16), gradients=1)


def test_more_steps_of_the_weight_gradient_than_stages() -> None:
    """So many tiles that their rows are not split: six steps."""
    case = PatchEmbedCase("steps", batch=11, patch=(8, 8), channels=29, grid=(5, 6), width=1160, prefix=0)
    inputs = make_inputs(case, torch.bfloat16)
    images = inputs.tensors["images"]
    assert images is not None
    with emulation(**HOPPER):
        found = _backward(inputs, [False, True, False, False])[1]
    patches = torch.nn.functional.unfold(images.double(), 8, stride=8)  # [B, K, N]
    expected = inputs.grad.to(inputs.compute).double().transpose(1, 2) @ patches.transpose(1, 2)
    assert relative_error(found, expected.sum(0).view(found.shape)) < 2**-8


@pytest.mark.parametrize("device", [{}, LARGE, HOPPER], ids=["small", "large", "hopper"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_schedule_changes_nothing(seed: int, device: dict[str, Any]) -> None:
    case = PatchEmbedCase("schedules", batch=3, grid=(3, 3), patch=(8, 8), width=136, images="uint8", normalise=True)
    inputs = make_inputs(case, torch.bfloat16)
    with emulation(**device):
        first = _results(inputs)
        with emulation(seed=seed):
            again = _results(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradients_of_unconverted_pixels_are_not_rounded() -> None:
    """uint8 pixels less an integer are exact in 16 bits, so that a weight gradient has the error of its sums alone."""
    case = PatchEmbedCase("exact", batch=4, grid=(4, 4), patch=(8, 8), images="uint8", normalise=True,
                          parameters="masters")  # fmt: skip
    inputs = make_inputs(case, torch.bfloat16)
    gradient = _weight_gradient(inputs, "emulated", inputs.tensors)
    wide = {name: None if t is None else t if t.dtype is torch.uint8 else t.double()
            for name, t in inputs.tensors.items()}  # fmt: skip
    assert relative_error(gradient, _weight_gradient(inputs, "reference", wide)) < 1e-6


@pytest.mark.parametrize("images", ["uint8", "same", "bfloat16"])
@pytest.mark.parametrize("device", [{}, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("width", [63, 72])
def test_tf32_is_as_exact_as_operands_rounded_to_it(width: int, images: str, device: dict[str, Any]) -> None:
    case = PatchEmbedCase("tf32", batch=3, grid=(3, 5), patch=(8, 8), width=width, images=images, normalise=True)
    inputs = make_inputs(case, torch.float32)
    exact = _gradients(inputs, "reference", {n: None if t is None else t if t.dtype is torch.uint8 else t.double()
                                             for n, t in inputs.tensors.items()})  # fmt: skip
    with emulation(tf32=True, **device):
        bank_conflicts()
        found = _gradients(inputs, "emulated", inputs.tensors)
        assert bank_conflicts() == 0
    for quantity, wanted in exact.items():
        error = relative_error(found[quantity], wanted)
        # Operands rounded to eleven bits; an image's gradient is rounded to the image's type besides.
        assert error < (2**-8 if (images, quantity) == ("bfloat16", "images") else 2**-11), quantity
        if quantity in ("forward", "weight") and not (images == "uint8" and quantity == "weight"):
            assert error > 2**-16, f"{quantity}: not at TF32 precision"


@pytest.mark.parametrize("index", [-1, 9, 2**40])
def test_a_patch_that_does_not_exist_is_nan_and_nothing_else(index: int) -> None:
    case = PatchEmbedCase("keep", grid=(3, 3), patch=(8, 8), keep=4, prefix=1)
    inputs = make_inputs(case, torch.bfloat16)
    right = _tokens(inputs, inputs.keep)
    assert inputs.keep is not None
    keep = inputs.keep.clone()
    keep[1, 2] = index
    wrong = _tokens(inputs, keep)
    assert wrong[1, 3].isnan().all()
    wrong[1, 3] = right[1, 3]
    assert torch.equal(wrong, right)


@pytest.mark.parametrize("images", ["uint8", "same", "float32"])
def test_a_patch_that_does_not_exist_contributes_to_no_gradient(images: str) -> None:
    case = PatchEmbedCase("keep", grid=(3, 3), patch=(8, 8), keep=4, images=images, normalise=True)
    inputs = make_inputs(case, torch.bfloat16)
    assert inputs.keep is not None
    keep, grad = inputs.keep.clone(), inputs.grad.clone()
    keep[1, 2] = 9
    grad[1, 3] = 0
    wrong = _backward(dataclasses.replace(inputs, keep=keep))
    without = _backward(dataclasses.replace(inputs, grad=grad))
    assert all(torch.equal(a, b) for a, b in zip(wrong, without, strict=True))


@pytest.mark.parametrize(
    ("dtype", "images"), [(torch.float32, "same"), (torch.bfloat16, "same"), (torch.bfloat16, "uint8")], ids=str
)
@pytest.mark.parametrize("width", [63, 64])
def test_more_patches_kept_than_there_are_and_one_that_does_not_exist(
    width: int, dtype: torch.dtype, images: str
) -> None:
    """Its row of `keep` lies behind the last row of the positions."""
    case = PatchEmbedCase("keep", batch=1, grid=(2, 3), patch=(8, 8), width=width, keep=10, repeat_keep=True,
                          images=images, normalise=True)  # fmt: skip
    inputs = make_inputs(case, dtype)
    keep = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 99]])
    tokens = _tokens(inputs, keep)
    right = _tokens(inputs, keep.clamp(max=5))
    assert tokens[0, -1].isnan().all() and torch.equal(tokens[0, :-1], right[0, :-1]) and right.isfinite().all()
    inputs.grad[0, -1] = 0
    wrong = _backward(dataclasses.replace(inputs, keep=keep))
    without = _backward(dataclasses.replace(inputs, keep=keep.clamp(max=5)))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(wrong, without, strict=True))


def test_an_infinite_weight_gives_infinity_as_plain_pytorch_does() -> None:
    images, weight = torch.rand(1, 3, 8, 8), torch.ones(4, 3, 8, 8)
    weight[1, 2, 3, 4] = float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        tokens = functional.patch_embed(images.to(dtype), weight.to(dtype), backend="emulated")
        assert tokens[0, 0].isinf().tolist() == [False, True, False, False] and not tokens.isnan().any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_images_at_any_address(dtype: torch.dtype) -> None:
    whole = torch.randint(0, 255, (2 * 3 * 16 * 16 + 1,)).to(dtype)
    images, weight = whole[1:].view(2, 3, 16, 16), torch.randn(24, 3, 8, 8, dtype=torch.bfloat16)
    assert images.data_ptr() % 16
    found = functional.patch_embed(images, weight, backend="emulated")
    assert torch.equal(found, functional.patch_embed(images.clone(), weight, backend="emulated"))


def test_images_that_no_kernel_reads_are_copied() -> None:
    images = torch.randn(8, 8, 3, 2).permute(3, 2, 1, 0).requires_grad_()  # neither rows nor pixels lie together
    weight = torch.randn(5, 3, 4, 4)
    for backend in ("emulated", "reference"):
        (gradient,) = torch.autograd.grad(
            functional.patch_embed(images, weight, backend=backend).square().sum(), images
        )
        if backend == "emulated":
            found = gradient
    assert found.stride() == images.stride()
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)


def _constants(inputs: Inputs) -> tuple[Tensor, Tensor]:
    from fastvit.kernels.normalisation import channel_constants, constants_on_device, image_gradient_constants

    images = inputs.tensors["images"]
    assert images is not None
    of_pixels = channel_constants(inputs.mean, inputs.std, images.shape[1], images.dtype, inputs.compute)
    of_gradient = image_gradient_constants(inputs.std, images.shape[1])
    return constants_on_device(of_pixels, images.device), constants_on_device(of_gradient, images.device)


def _tokens(inputs: Inputs, keep: Tensor | None) -> Tensor:
    """Without the check of `keep`, which on a GPU would have to wait."""
    images, weight, *rest = (inputs.tensors[name] for name in ("images", "weight", "bias", "pos_embed", "prefix"))
    assert images is not None and weight is not None
    return ops.patch_embed(images, weight, *rest, keep, _constants(inputs)[0], inputs.compute, inputs.out, False)


def _backward(inputs: Inputs, needs: list[bool] | None = None) -> tuple[Tensor, ...]:
    images, weight, prefix = (inputs.tensors[name] for name in ("images", "weight", "prefix"))
    assert images is not None and weight is not None
    return ops.patch_embed_backward(
        inputs.grad, inputs.grad.to(inputs.compute), images, weight, inputs.keep, *_constants(inputs), inputs.compute,
        0 if prefix is None else prefix.shape[0], False, inputs.mean is not None,
        needs or [images.is_floating_point(), True, True, True],
    )  # fmt: skip


def _results(inputs: Inputs) -> tuple[Tensor, ...]:
    return _tokens(inputs, inputs.keep), *_backward(inputs)


def _call(inputs: Inputs, backend: str, tensors: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
              for name, t in tensors.items()}  # fmt: skip
    with torch.autocast("cpu", inputs.compute, enabled=inputs.autocast and backend == "emulated"):
        tokens = functional.patch_embed(
            leaves["images"], leaves["weight"], leaves["bias"], pos_embed=leaves["pos_embed"], prefix=leaves["prefix"],
            mean=inputs.mean, std=inputs.std, keep=inputs.keep, backend=backend,
        )  # fmt: skip
    return tokens, {name: t for name, t in leaves.items() if t is not None and t.requires_grad}


def _gradients(inputs: Inputs, backend: str, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    tokens, leaves = _call(inputs, backend, tensors)
    found = torch.autograd.grad(tokens, list(leaves.values()), inputs.grad.to(tokens.dtype))
    return {"forward": tokens.detach(), **dict(zip(leaves, found, strict=True))}


def _weight_gradient(inputs: Inputs, backend: str, tensors: dict[str, Tensor | None]) -> Tensor:
    return _gradients(inputs, backend, tensors)["weight"]
