"""The tolerance rule: what it lets pass, and what a norm over the whole tensor would have hidden."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation import assert_close, compare, relative_error


def _tokens(dtype: torch.dtype, batch: int = 4, rows: int = 50, width: int = 96) -> tuple[torch.Tensor, ...]:
    truth = torch.randn(batch, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return truth, truth.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_passes_against_one_rounding(dtype: torch.dtype) -> None:
    truth, rounded = _tokens(dtype)
    found = compare(rounded, rounded, truth)
    assert found.passed and found.bound >= 2 * found.error


def test_twice_the_error_is_the_limit_in_half_precision() -> None:
    truth, rounded = _tokens(torch.bfloat16)
    error = rounded.double() - truth
    assert compare(truth + 1.99 * error, rounded, truth).passed
    assert not compare(truth + 2.01 * error, rounded, truth).passed


def test_float32_has_a_floor_of_four_eps_and_half_precision_none() -> None:
    truth, _ = _tokens(torch.float32)
    eps = torch.finfo(torch.float32).eps
    truth = truth.float().double()  # exact in float32, so that plain PyTorch's error is zero
    assert compare((truth * (1 + 3 * eps)).float(), truth.float(), truth).passed
    assert not compare((truth * (1 + 6 * eps)).float(), truth.float(), truth).passed
    exact = truth.bfloat16()
    off = exact.clone()
    off[0, 0, 0] = torch.nextafter(off[0, 0, 0], off.new_tensor(100.0))
    assert compare(exact, exact, exact.double()).passed
    assert not compare(off, exact, exact.double()).passed


def test_one_wrong_token_fails_although_the_whole_norm_is_fine() -> None:
    truth, rounded = _tokens(torch.bfloat16, batch=64, rows=200, width=32)
    out = rounded.clone()
    out[-1, -1] *= 1.02
    assert relative_error(out, truth) < 2 * relative_error(rounded, truth)
    found = compare(out, rounded, truth)
    assert not found.passed and found.where == "worst token: (63, 199)"


def test_the_worst_slice_is_named() -> None:
    truth, rounded = _tokens(torch.float32)
    column, weight = rounded.clone(), rounded.clone().view(50, 8, 4, 12)
    column[..., -1] *= 1.5
    assert "column: 95" in compare(column, rounded, truth).where
    weight[7] = 0
    assert "row: 7" in compare(weight, rounded.view(50, 8, 4, 12), truth.view(50, 8, 4, 12)).where


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_fails(value: float) -> None:
    truth, rounded = _tokens(torch.float32)
    out = rounded.clone()
    out[1, 2, 3] = value
    assert not compare(out, rounded, truth).passed
    assert not compare(rounded, out, truth).passed  # without a yardstick there is no verdict to be had


def test_zero_truth_needs_exact_zeros_or_the_scale_of_its_neighbours() -> None:
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    assert compare(zeros.float(), zeros.float(), zeros).passed
    assert not compare(zeros.float() + 1e-30, zeros.float(), zeros).passed
    truth = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth[2] = 0
    rounded = truth.float()
    stray = rounded.clone()
    stray[2, 0] = 1e-3
    assert compare(rounded, rounded, truth).passed
    assert not compare(stray, rounded, truth).passed


def test_shapes_and_empty_tensors() -> None:
    empty = torch.empty(0, 5, 7)
    assert compare(empty, empty, empty.double()).passed
    assert not compare(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4).double()).passed
    with pytest.raises(AssertionError, match="tokens: shapes differ"):
        assert_close(torch.ones(2), torch.ones(3), torch.ones(3).double(), "tokens")
    with pytest.raises(AssertionError, match="tokens: error .* is over the bound"):
        assert_close(torch.ones(3) * 2, torch.ones(3), torch.ones(3).double(), "tokens")
