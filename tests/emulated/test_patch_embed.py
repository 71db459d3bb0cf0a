"""The CUDA kernel of patch_embed, emulated, held to float64 by the rule that every backend is held to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastvit.emulated import patch_embed
from fastvit.emulated.call import bank_conflicts, emulation
from fastvit.validation import assert_close, plain
from fastvit.validation.cases import DTYPES, PATCH_EMBED_TINY, Inputs, PatchEmbedCase, make_inputs
from fastvit.validation.tolerance import relative_error

HALF = ("bfloat16", "float16")


def _tokens(inputs: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    tensors = inputs.tensors
    images, weight = tensors["images"], tensors["weight"]
    assert images is not None and weight is not None
    rest = (tensors[name] for name in ("bias", "pos_embed", "prefix"))
    out = dtype or inputs.out
    return patch_embed.forward(images, weight, *rest, inputs.mean, inputs.std, inputs.keep, inputs.compute, out)


def _truth(inputs: Inputs) -> Tensor:
    wide = {name: None if t is None else t if t.dtype is torch.uint8 else t.double()
            for name, t in inputs.tensors.items()}  # fmt: skip
    return plain.true_patch_embed(inputs, wide)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PATCH_EMBED_TINY, ids=lambda case: case.name)
def test_every_case(case: PatchEmbedCase, dtype: str) -> None:
    inputs = make_inputs(case, DTYPES[dtype])
    assert_close(_tokens(inputs), plain.plain_patch_embed(inputs, inputs.tensors), _truth(inputs))
    assert bank_conflicts() == 0


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("images", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_any_number_of_steps(steps: int, images: str, layout: str) -> None:
    """K of 1 to 7 tiles: fewer than there are stages, as many, and every remainder."""
    case = PatchEmbedCase("steps", patch=(8, 4), channels=steps, grid=(3, 3), width=72, images=images, layout=layout,
                          normalise=True)  # fmt: skip
    inputs = make_inputs(case, torch.bfloat16)
    assert_close(_tokens(inputs), plain.plain_patch_embed(inputs, inputs.tensors), _truth(inputs))


def test_more_rows_and_columns_than_a_tile() -> None:
    case = PatchEmbedCase("tiles", batch=5, grid=(5, 6), patch=(4, 4), channels=5, width=136, prefix=2)
    inputs = make_inputs(case, torch.float16)
    assert_close(_tokens(inputs), plain.plain_patch_embed(inputs, inputs.tensors), _truth(inputs))
    assert 5 * 30 > patch_embed.SPLIT_ROWS
    assert_close(_weight_gradient(inputs), _derivative(inputs, None), _derivative(inputs, torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_the_schedule_changes_nothing(seed: int) -> None:
    inputs = make_inputs(PATCH_EMBED_TINY[1], torch.bfloat16)
    first = _tokens(inputs)
    with emulation(seed=seed):
        assert torch.equal(_tokens(inputs), first)


@pytest.mark.parametrize("index", [-1, 9, 2**40])
def test_a_patch_that_does_not_exist_is_nan_and_nothing_else(index: int) -> None:
    case = PatchEmbedCase("keep", grid=(3, 3), patch=(8, 8), keep=4, prefix=1)
    inputs = make_inputs(case, torch.bfloat16)
    right = _tokens(inputs)
    assert inputs.keep is not None
    keep = inputs.keep.clone()
    keep[1, 2] = index
    wrong = _tokens(dataclasses.replace(inputs, keep=keep))
    assert wrong[1, 3].isnan().all()
    wrong[1, 3] = right[1, 3]
    assert torch.equal(wrong, right)


def _weight_gradient(inputs: Inputs) -> Tensor:
    images, weight, prefix = (inputs.tensors[name] for name in ("images", "weight", "prefix"))
    assert images is not None and weight is not None
    rows = 0 if prefix is None else prefix.shape[0]
    grad = inputs.grad.to(inputs.compute)
    return patch_embed.weight_gradient(grad, images, weight, inputs.mean, inputs.std, inputs.keep, rows)


def _derivative(inputs: Inputs, dtype: torch.dtype | None) -> Tensor:
    """The weight's gradient by autograd: of plain PyTorch, or of the reference in float64."""
    tensors = dict(inputs.tensors)
    if dtype is not None:
        tensors = {name: None if t is None else t if t.dtype is torch.uint8 else t.to(dtype)
                   for name, t in tensors.items()}  # fmt: skip
    weight = tensors["weight"]
    assert weight is not None
    tensors["weight"] = weight = weight.detach().clone().requires_grad_()
    run = plain.plain_patch_embed if dtype is None else plain.true_patch_embed
    tokens = run(inputs, tensors)
    return torch.autograd.grad(tokens, weight, inputs.grad.to(tokens.dtype))[0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", PATCH_EMBED_TINY, ids=lambda case: case.name)
def test_weight_gradient_of_every_case(case: PatchEmbedCase, dtype: str) -> None:
    inputs = make_inputs(case, DTYPES[dtype])
    found, exact = _weight_gradient(inputs), _derivative(inputs, torch.float64)
    if exact.abs().max() == 0:
        assert found.abs().max() == 0
        return
    assert_close(found, _derivative(inputs, None), exact)
    assert bank_conflicts() == 0
    if inputs.tensors["images"] is not None and inputs.tensors["images"].dtype in (torch.uint8, inputs.compute):
        assert relative_error(found, exact) < 1e-5 or inputs.out != inputs.compute  # nothing but the sums is rounded


def test_a_patch_that_does_not_exist_contributes_to_no_gradient() -> None:
    case = PatchEmbedCase("keep", grid=(3, 3), patch=(8, 8), keep=4, images="uint8", normalise=True)
    inputs = make_inputs(case, torch.bfloat16)
    assert inputs.keep is not None
    keep, grad = inputs.keep.clone(), inputs.grad.clone()
    keep[1, 2] = 9
    grad[1, 3] = 0
    wrong = dataclasses.replace(inputs, keep=keep)
    without = dataclasses.replace(inputs, grad=grad)
    assert torch.equal(_weight_gradient(wrong), _weight_gradient(without))
