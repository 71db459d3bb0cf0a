"""The binding to PyTorch over emulated kernels: arguments, layouts, dtypes, results and messages.

That a value arrives where it belongs is what is tested here; how exact it is, tests/emulated hold to the reference.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FLOATS = (F32, F16, BF16)
PIXELS = (torch.uint8, *FLOATS)
# Relative to the norm; some roundings to the narrowest dtype that takes part.
BOUND = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}
NOTHING_TO_NORMALISE = ((1.0,) * 3, (0.0,) * 3, (0.0,) * 3, (1.0,) * 3)
IMAGE, PATCH, WIDTH = (3, 16, 24), 8, 16  # two rows of three patches
N = 6


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def constants_for(images: Tensor) -> Tensor:
    """No mean and no std: W' carries 256 / 255 of uint8 images, and 256 is divided out."""
    scale = 256 / 255 if images.dtype == torch.uint8 else 1.0
    return torch.tensor(NOTHING_TO_NORMALISE) * torch.tensor([[scale], [1.0], [1.0], [1.0]])


def random_images(dtype: torch.dtype, batch: int = 2) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (batch, *IMAGE), dtype=dtype)
    return torch.randn(batch, *IMAGE).to(dtype)


def expected_tokens(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The op in plain float64."""
    pixels = images.double() / (255.0 if images.dtype == torch.uint8 else 1.0)
    bias = None if bias is None else bias.double()
    tokens = conv2d(pixels, weight.double(), bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    rows = 0 if prefix is None else prefix.shape[0]
    table = torch.zeros(rows + tokens.shape[1], weight.shape[0], dtype=torch.float64)
    if pos_embed is not None:
        table[-pos_embed.shape[0] :] += pos_embed
    if prefix is not None:
        table[:rows] += prefix
    tokens = tokens + table[rows:]
    if keep is not None:
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, weight.shape[0]))
    return torch.cat((table[:rows].expand(images.shape[0], -1, -1), tokens), 1)


def patch_embed(ops: Any, images: Tensor, weight: Tensor, *more: Any, compute: Any = F32, out: Any = F32) -> Tensor:
    """The op; `more` are bias, pos_embed, prefix and keep, as far as they are given."""
    rest = [*more, *[None] * (4 - len(more))]
    return ops.patch_embed_cuda(images, weight, *rest, constants_for(images), compute, out, False)


def backward(
    ops: Any, grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None = None, rows: int = 0, **options: Any
) -> list[Tensor]:
    compute, needs = options.get("compute", F32), options.get("needs", [images.dtype != torch.uint8, True, True, True])
    constants, of_images = constants_for(images), torch.tensor(NOTHING_TO_NORMALISE)
    arguments = (grad, grad.to(compute), images, weight, keep, constants, of_images, compute, rows, False, False, needs)
    return list(ops.patch_embed_backward_cuda(*arguments))


def expected_gradients(grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, rows: int) -> list[Tensor]:
    """d_images, d_weight, d_bias and d_rows by autograd, in float64; d_images of uint8 images is not to be used."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    pixels, kernel = (images.double() / scale).requires_grad_(), weight.double().requires_grad_()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64, requires_grad=True)
    positions = torch.zeros(rows + N, weight.shape[0], dtype=torch.float64, requires_grad=True)
    tokens = conv2d(pixels, kernel, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + positions[rows:]
    if keep is not None:
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, weight.shape[0]))
    tokens = torch.cat((positions[:rows].expand(images.shape[0], -1, -1), tokens), 1)
    return list(torch.autograd.grad(tokens, (pixels, kernel, bias, positions), grad.double()))


# Layouts that mean the same tensor


def sliced(tensor: Tensor) -> Tensor:
    """As every second of a tensor twice as wide."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def spread(tensor: Tensor) -> Tensor:
    """Rows side by side, images further apart than they are long."""
    room = torch.zeros(2 * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype)
    room[::2] = tensor
    return room[::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


LAYOUTS = (Tensor.contiguous, sliced, spread, transposed, channels_last)


# add_position


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_position_rounds_the_sum_once(ops: Any, dtype: torch.dtype, out: torch.dtype) -> None:
    tokens, positions, prefix = torch.randn(3, 5, 16).to(dtype), torch.randn(7, 16).to(out), torch.randn(2, 16)
    found = ops.add_position_cuda(tokens, positions, prefix, out)
    expected = torch.cat((prefix.expand(3, -1, -1), tokens.float()), 1) + positions.float()
    assert found.dtype == out and torch.equal(found, expected.to(out))


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("prefix_rows", [None, 0, 2])
def test_add_position_takes_any_layout(ops: Any, layout: Callable, prefix_rows: int | None) -> None:
    tokens, positions = torch.randn(3, 5, 12), torch.randn(5, 12)
    prefix = None if prefix_rows is None else torch.randn(prefix_rows, 12)
    found = ops.add_position_cuda(
        layout(tokens), transposed(positions), None if prefix is None else sliced(prefix), F32
    )
    rows = torch.empty(0, 12) if prefix is None else prefix
    assert torch.equal(found, torch.cat((rows.expand(3, -1, -1), tokens + positions), 1))
    assert found.is_contiguous()


def test_add_position_reads_an_expanded_batch(ops: Any) -> None:
    tokens, positions = torch.randn(1, 5, 16), torch.randn(5, 16)
    found = ops.add_position_cuda(tokens.expand(4, -1, -1), positions, None, F32)
    assert torch.equal(found, (tokens + positions).expand(4, -1, -1))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_add_position_of_nothing(ops: Any, shape: tuple[int, ...]) -> None:
    tokens, prefix = torch.randn(shape), torch.randn(1, shape[2])
    found = ops.add_position_cuda(tokens, torch.randn(shape[1:]), prefix, BF16)
    assert found.shape == (shape[0], shape[1] + 1, shape[2]) and found.dtype == BF16
    if found.numel():  # the prefix alone
        assert torch.equal(found, prefix.to(BF16).expand(shape[0], 1, -1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_add_position_backward(ops: Any, layout: Callable, dtype: torch.dtype) -> None:
    grad = torch.randn(9, 5, 12).to(dtype)
    found = ops.add_position_backward_cuda(layout(grad))
    assert found.dtype == F32 and relative(found, grad.double().sum(0)) < BOUND[F32]


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_add_position_backward_of_nothing(ops: Any, shape: tuple[int, ...]) -> None:
    assert torch.equal(ops.add_position_backward_cuda(torch.randn(shape)), torch.zeros(shape[1:]))


# add_norm


def norm_arguments(*shape: int, **changes: Any) -> dict[str, Any]:
    """Of `add_norm_cuda`, in its order: everything that it can be given."""
    shape, dtypes = shape or (2, 5, 16), {"sum_dtype": F32, "dtype": F32}
    vectors = {name: torch.randn(shape[-1]) for name in ("bias", "scale", "weight", "norm_bias")}
    keep = torch.tensor([2.0, 0.0, 0.5])[: shape[0]] if len(shape) > 1 else None
    given = {"residual": torch.randn(shape), "branch": torch.randn(shape), "bias": None, "scale": None, "keep": keep}
    return {**given, **vectors, "eps": 1e-6, "rms": False, **dtypes, **changes}


def norm_in_float64(arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """sum, normed and statistics; and for `backward_arguments` the gradients, of weight, norm_bias, bias, scale too."""
    wide = {
        name: value.double().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    residual, branch, bias, scale, keep, weight, norm_bias = list(wide.values())[:7]
    total = residual
    if branch is not None:
        change = branch if bias is None else branch + bias
        change = change if scale is None else change * scale
        change = change if keep is None else change * keep.view(-1, *[1] * (residual.dim() - 1))
        total = total + change
    mean = total.mean(-1, keepdim=True) * (not arguments["rms"])
    deviation = ((total - mean).square().mean(-1, keepdim=True) + arguments["eps"]).rsqrt()
    normed = (total - mean) * deviation * weight + (0 if norm_bias is None else norm_bias)
    results = [total, normed, torch.stack((mean.flatten(), deviation.flatten()))]
    wanted = [tensor for tensor in (residual, branch, weight, norm_bias, bias, scale) if tensor is not None]
    outputs = (normed,) if branch is None else (total, normed)
    grads = [norm_grad(0, normed), norm_grad(1, normed)][-len(outputs) :]
    return results, list(torch.autograd.grad(outputs, wanted, [grad.double() for grad in grads]))


def norm_grad(which: int, like: Tensor, dtype: torch.dtype = F32) -> Tensor:
    """Of the sum, and of its norm."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(which)).to(dtype)


def norm_backward(ops: Any, arguments: dict[str, Any], results: Sequence[Tensor], layout: Callable) -> list[Tensor]:
    """d_residual, d_branch and the gradients of the vectors that are there, one by one."""
    residual, branch, *vectors = list(arguments.values())[:7]
    total, normed, statistics = results
    d_sum = None if branch is None else layout(norm_grad(0, residual))
    given = (layout(residual if branch is None else total), layout(norm_grad(1, normed, normed.dtype)), d_sum, branch)
    found = ops.add_norm_backward_cuda(*given, *vectors, statistics, arguments["rms"], residual.dtype)
    d_residual, d_branch, d_vectors = found
    if d_branch.shape == (0,):
        return [d_residual, *([] if branch is None else [d_residual]), *d_vectors]
    return [d_residual, d_branch, *d_vectors]


def check_add_norm(ops: Any, arguments: dict[str, Any], bound: float, layout: Callable = Tensor.contiguous) -> None:
    """Results and gradients against float64."""
    given = {n: layout(v) if isinstance(v, Tensor) and v.dim() > 1 else v for n, v in arguments.items()}
    found = ops.add_norm_cuda(*given.values())
    expected, expected_gradients = norm_in_float64(arguments)
    has_branch = arguments["branch"] is not None
    assert has_branch or found[0].shape == (0,)
    assert (found[0].dtype, found[1].dtype) == (arguments["sum_dtype"], arguments["dtype"])
    for tensor, truth in list(zip(found, expected, strict=True))[not has_branch :]:
        assert relative(tensor, truth) < bound and tensor.is_contiguous()
    gradients = norm_backward(ops, given, found, layout)
    for tensor, truth in zip(gradients, expected_gradients, strict=True):
        assert relative(tensor, truth) < bound


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_add_norm_takes_any_layout(ops: Any, layout: Callable) -> None:
    vectors = {name: sliced(torch.randn(16)) for name in ("bias", "scale", "weight", "norm_bias")}
    check_add_norm(ops, norm_arguments(**vectors, keep=sliced(torch.tensor([2.0, 0.5]))), BOUND[F32], layout)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 2, 2, 16), (1, 1, 8192)])
def test_add_norm_of_any_dimensions(ops: Any, shape: tuple[int, ...]) -> None:
    check_add_norm(ops, norm_arguments(*shape), BOUND[F32])


@pytest.mark.parametrize(
    "missing",
    [("bias",), ("scale",), ("keep",), ("norm_bias",), ("scale", "keep"), ("bias", "scale", "keep", "branch")],
)
@pytest.mark.parametrize("rms", [False, True])
def test_add_norm_without_some_of_it(ops: Any, missing: tuple[str, ...], rms: bool) -> None:
    check_add_norm(ops, norm_arguments(rms=rms, **dict.fromkeys(missing)), BOUND[F32])


@pytest.mark.parametrize("dtypes", [*itertools.permutations(FLOATS)])
def test_add_norm_takes_a_dtype_each(ops: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    stream, branch, out = dtypes
    arguments = norm_arguments(sum_dtype=stream, dtype=out)
    for name, dtype in zip(("residual", "branch", "bias", "scale", "weight"), (*dtypes, *dtypes), strict=False):
        arguments[name] = arguments[name].to(dtype)
    check_add_norm(ops, arguments, BOUND[BF16])
    check_add_norm(ops, arguments | {"scale": None, "keep": None}, BOUND[BF16])


def test_a_branch_of_the_residuals_dtype_shares_its_gradient(ops: Any) -> None:
    arguments = norm_arguments(scale=None, keep=None)
    total, _, statistics = ops.add_norm_cuda(*arguments.values())
    grad, rest = torch.randn(2, 5, 16), (None, None, None, arguments["weight"], None, statistics, False)
    for branch, residual_dtype, size in ((torch.empty(0), F32, 0), (torch.empty(0), BF16, 160), (None, BF16, 0)):
        found = ops.add_norm_backward_cuda(total, grad, None, branch, *rest, residual_dtype)
        assert found[0].dtype == residual_dtype and found[0].shape == (2, 5, 16)
        assert found[1].numel() == size and found[1].dtype == (residual_dtype if branch is None else F32)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_add_norm_of_nothing(ops: Any, shape: tuple[int, ...]) -> None:
    arguments = norm_arguments(*shape, keep=torch.ones(shape[0]), dtype=BF16)
    total, normed, statistics = ops.add_norm_cuda(*arguments.values())
    assert total.shape == normed.shape == shape and statistics.shape == (2, 0) and normed.dtype == BF16
    d_residual, d_branch, *d_vectors = norm_backward(ops, arguments, (total, normed, statistics), Tensor.contiguous)
    assert d_residual.shape == d_branch.shape == shape and not any(vector.any() for vector in d_vectors)


def test_a_vector_anywhere_leaves_the_rows_wide(ops: Any) -> None:
    arguments = norm_arguments()
    for name in ("bias", "scale", "weight", "norm_bias"):
        room = torch.empty(17)
        room[1:] = arguments[name]
        assert room[1:].data_ptr() % 16
        expected = ops.add_norm_cuda(*arguments.values())
        found = ops.add_norm_cuda(*(arguments | {name: room[1:]}).values())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# patch_embed


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("compute", FLOATS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_patch_embed_of_every_dtype(ops: Any, pixels: torch.dtype, compute: torch.dtype, out: torch.dtype) -> None:
    images, weight = random_images(pixels), torch.randn(WIDTH, 3, PATCH, PATCH).to(compute)
    bias, positions, prefix = torch.randn(WIDTH).to(out), torch.randn(N, WIDTH), torch.randn(1, WIDTH).to(compute)
    found = patch_embed(ops, images, weight, bias, positions, prefix, compute=compute, out=out)
    assert found.dtype == out
    assert relative(found, expected_tokens(images, weight, bias, positions, prefix)) < max(BOUND[compute], BOUND[out])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", [Tensor.contiguous, channels_last])
def test_patch_embed_takes_any_layout(ops: Any, layout: Callable, weight_layout: Callable) -> None:
    images, weight = random_images(F32), torch.randn(WIDTH, 3, PATCH, PATCH)
    bias, positions, prefix = torch.randn(WIDTH), torch.randn(N + 2, WIDTH), torch.randn(2, WIDTH)
    keep = torch.randint(0, N, (2, 4))
    views = weight_layout(weight), sliced(bias), transposed(positions), sliced(prefix), transposed(keep)
    found = patch_embed(ops, layout(images), *views)
    assert relative(found, expected_tokens(images, weight, bias, positions, prefix, keep)) < BOUND[F32]
    assert found.is_contiguous()


@pytest.mark.parametrize("given", ["", "bias", "pos_embed", "prefix", "keep"])
def test_patch_embed_without_what_is_optional(ops: Any, given: str) -> None:
    images, weight = random_images(F32), torch.randn(WIDTH, 3, PATCH, PATCH)
    everything = {
        "bias": torch.randn(WIDTH),
        "pos_embed": torch.randn(N, WIDTH),
        "prefix": torch.randn(3, WIDTH),
        "keep": torch.randint(0, N, (2, 3)),
    }
    some = [tensor if name == given else None for name, tensor in everything.items()]
    assert relative(patch_embed(ops, images, weight, *some), expected_tokens(images, weight, *some)) < BOUND[F32]


def test_patch_embed_of_patches_that_are_not_there(ops: Any) -> None:
    images, weight = random_images(F32), torch.randn(WIDTH, 3, PATCH, PATCH)
    found = patch_embed(ops, images, weight, None, None, None, torch.tensor([[0, -1], [N, 5]]))
    assert torch.equal(found.isnan().all(-1), torch.tensor([[False, True], [True, False]]))
    assert torch.equal(found.isnan().any(-1), found.isnan().all(-1))


@pytest.mark.parametrize(("batch", "kept"), [(0, None), (0, 2), (2, 0)])
def test_patch_embed_of_nothing(ops: Any, batch: int, kept: int | None) -> None:
    images, weight, prefix = random_images(F32, batch), torch.randn(WIDTH, 3, PATCH, PATCH), torch.randn(1, WIDTH)
    keep = None if kept is None else torch.zeros(batch, kept, dtype=torch.int64)
    found = patch_embed(ops, images, weight, None, None, prefix, keep)
    assert torch.equal(found, prefix.expand(batch, 1 + (N if kept is None else kept), -1)[:, : found.shape[1]])
    grad = torch.randn(found.shape)
    d_images, d_weight, d_bias, d_rows = backward(ops, grad, images, weight, keep, 1)
    assert torch.equal(d_images, torch.zeros_like(images)) and torch.equal(d_weight, torch.zeros_like(weight))
    assert torch.equal(d_bias, torch.zeros(WIDTH))
    assert d_rows.shape == (N + 1, WIDTH) and relative(d_rows[:1] + 1, grad[:, :1].sum(0) + 1) < BOUND[F32]
    assert torch.equal(d_rows[1:], torch.zeros(N, WIDTH))


@pytest.mark.parametrize("compute", FLOATS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_gradients_of_every_dtype(ops: Any, pixels: torch.dtype, compute: torch.dtype) -> None:
    images, weight = random_images(pixels), torch.randn(WIDTH, 3, PATCH, PATCH).to(compute)
    grad = torch.randn(2, N, WIDTH).to(compute)
    expected = expected_gradients(grad, images, weight, None, 0)
    if pixels == torch.uint8:
        expected[0] = torch.empty(0)
    found = backward(ops, grad, images, weight, compute=compute)
    assert [tensor.dtype for tensor in found] == [pixels, compute, F32, F32]
    bounds = [max(BOUND[compute], BOUND.get(pixels, 0)), BOUND[compute], BOUND[F32], BOUND[F32]]
    for tensor, truth, bound in zip(found, expected, bounds, strict=True):
        assert tensor.numel() == 0 == truth.numel() or relative(tensor, truth) < bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [None, 3])
def test_gradients_of_any_layout(ops: Any, layout: Callable, kept: int | None) -> None:
    images, weight = layout(random_images(F32)), torch.randn(WIDTH, 3, PATCH, PATCH)
    keep = None if kept is None else torch.randint(0, N, (2, kept))  # with repetitions: six places, two images
    grad = torch.randn(2, 2 + (kept or N), WIDTH)
    views = sliced(grad), images, channels_last(weight), None if keep is None else transposed(keep)
    found = backward(ops, *views, rows=2)
    for tensor, truth in zip(found, expected_gradients(grad, images, weight, keep, 2), strict=True):
        assert relative(tensor, truth) < BOUND[F32]
    # As torch.empty_like would lay it out, but where kernels can't write that.
    like = torch.empty_like(images)
    assert found[0].stride() == (like.contiguous() if layout is transposed else like).stride()


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_that_are_not_needed_are_empty(ops: Any, wanted: int) -> None:
    images, weight, grad = random_images(F32), torch.randn(WIDTH, 3, PATCH, PATCH), torch.randn(2, 1 + N, WIDTH)
    needs = [bool(wanted & 1 << i) for i in range(4)]
    found = backward(ops, grad, images, weight, rows=1, needs=needs)
    expected = expected_gradients(grad, images, weight, None, 1)
    for tensor, truth, is_needed in zip(found, expected, needs, strict=True):
        assert relative(tensor, truth) < BOUND[F32] if is_needed else tensor.shape == (0,)


def test_normalisation_is_in_the_constants(ops: Any) -> None:
    images, weight, bias = random_images(F32), torch.randn(WIDTH, 3, PATCH, PATCH), torch.randn(WIDTH)
    mean, std = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 2.0, 0.25])
    one, zero = torch.ones(3), torch.zeros(3)
    constants, of_images = torch.stack((1 / std, zero, -mean, one)), torch.stack((one, zero, zero, 1 / std))
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    found = ops.patch_embed_cuda(images, weight, bias, None, None, None, constants, F32, F32, False)
    assert relative(found, expected_tokens(normalised, weight, bias)) < BOUND[F32]

    grad = torch.randn_like(found)
    arguments = (grad, grad, images, weight, None, constants, of_images, F32, 0, False)
    d_images, d_weight, d_bias, _ = ops.patch_embed_backward_cuda(*arguments, True, [True] * 4)
    expected = expected_gradients(grad, normalised, weight, None, 0)
    assert relative(d_images, expected[0] / std[:, None, None]) < BOUND[F32]
    assert relative(d_weight, expected[1]) < BOUND[F32] and relative(d_bias, expected[2]) < BOUND[F32]
    _, without_mean, _, _ = ops.patch_embed_backward_cuda(*arguments, False, [True] * 4)
    assert relative(without_mean, expected[1]) > 0.1


def test_tf32_rounds_operands(ops: Any) -> None:
    images, weight = random_images(F32), torch.randn(WIDTH, 3, PATCH, PATCH)
    forward = (images, weight, None, None, None, None, constants_for(images), F32, F32)
    truth = expected_tokens(images, weight)
    assert 1e-5 < relative(ops.patch_embed_cuda(*forward, True), truth) < 1e-3
    grad = torch.randn(2, N, WIDTH)
    for tf32, least, most in ((False, 0.0, 1e-6), (True, 1e-5, 1e-3)):
        more = (None, constants_for(images), constants_for(images), F32, 0, tf32, False)
        found = ops.patch_embed_backward_cuda(grad, grad, images, weight, *more, [True] * 4)
        for tensor, expected in zip(found[:2], expected_gradients(grad, images, weight, None, 0)[:2], strict=True):
            assert least <= relative(tensor, expected) < most


# Messages: the argument, its value and what is accepted


def call_add_position(ops: Any, **changes: Any) -> Tensor:
    arguments = {"tokens": torch.randn(2, 5, 8), "pos_embed": torch.randn(5, 8), "prefix": None, "dtype": F32}
    return ops.add_position_cuda(*(arguments | changes).values())


def call_add_position_backward(ops: Any, **changes: Any) -> Tensor:
    arguments = {"grad": torch.randn(2, 5, 8)}
    return ops.add_position_backward_cuda(*(arguments | changes).values())


def call_patch_embed(ops: Any, **changes: Any) -> Tensor:
    arguments = {
        "images": random_images(F32), "weight": torch.randn(WIDTH, 3, PATCH, PATCH), "bias": None, "pos_embed": None,
        "prefix": None, "keep": None, "constants": torch.ones(4, 3), "compute_dtype": F32, "dtype": F32, "tf32": False,
    }  # fmt: skip
    return ops.patch_embed_cuda(*(arguments | changes).values())


def call_backward(ops: Any, **changes: Any) -> Any:
    arguments = {
        "grad": torch.randn(2, N, WIDTH), "product_grad": torch.randn(2, N, WIDTH), "images": random_images(F32),
        "weight": torch.randn(WIDTH, 3, PATCH, PATCH), "keep": None, "constants": torch.ones(4, 3),
        "of_images": torch.ones(4, 3), "compute": F32, "rows": 0, "tf32": False, "has_mean": False, "needs": [True] * 4,
    }  # fmt: skip
    return ops.patch_embed_backward_cuda(*(arguments | changes).values())


def call_add_norm(ops: Any, **changes: Any) -> Any:
    return ops.add_norm_cuda(*norm_arguments(**changes).values())


def call_add_norm_backward(ops: Any, **changes: Any) -> Any:
    arguments = {
        "total": torch.randn(2, 5, 16), "d_normed": torch.randn(2, 5, 16), "d_total": None,
        "branch": torch.randn(2, 5, 16), "bias": None, "scale": torch.randn(16), "keep": None,
        "weight": torch.randn(16), "norm_bias": None, "statistics": torch.randn(2, 10), "rms": False,
        "residual_dtype": F32,
    }  # fmt: skip
    return ops.add_norm_backward_cuda(*(arguments | changes).values())


BAD: Sequence[tuple[Callable, dict[str, Any], str]] = (
    (call_add_position, {"tokens": torch.zeros(2, 5, 8).int()}, "tokens: dtype Int is not supported; accepted: Float,"),
    (call_add_position, {"tokens": torch.zeros(2, 8)}, "tokens: expected 3 dimensions [B, N, D], got 2"),
    (call_add_position, {"pos_embed": torch.zeros(1, 5, 8)}, "pos_embed: expected 2 dimensions [rows, D], got 3"),
    (call_add_position, {"pos_embed": torch.zeros(4, 8)}, "pos_embed: expected [5, 8] or [5, 8], got [4, 8]"),
    (call_add_position, {"pos_embed": torch.zeros(5, 9)}, "pos_embed: expected [5, 8] or [5, 8], got [5, 9]"),
    (call_add_position, {"pos_embed": torch.zeros(5, 8).double()}, "pos_embed: dtype Double is not supported"),
    (call_add_position, {"prefix": torch.zeros(1, 9)}, "prefix: expected [R, 8], got [1, 9]"),
    (call_add_position, {"dtype": torch.float64}, "dtype: dtype Double is not supported; accepted: Float, Half, BFl"),
    (
        call_add_position,
        {"tokens": torch.zeros(1, 1, 8).expand(2**29, 5, 8)},
        "tokens: 536870912 x 5 rows of width 8; rows, and values a sample, must be < 2^31",
    ),
    (call_patch_embed, {"images": random_images(F32).long()}, "images: dtype Long is not supported; accepted: Byte, "),
    (call_patch_embed, {"images": torch.zeros(3, 16, 24)}, "images: expected 4 dimensions [B, C, H, W], got 3"),
    (call_patch_embed, {"images": torch.zeros(2, 4, 16, 24)}, "images: 4 channels, but weight expects 3"),
    (call_patch_embed, {"images": torch.zeros(2, 3, 16, 20)}, "images: 16 x 20 is not a positive multiple of the pat"),
    (call_patch_embed, {"images": torch.zeros(2, 3, 0, 24)}, "images: 0 x 24 is not a positive multiple of the patch"),
    (call_patch_embed, {"weight": torch.zeros(0, 3, 8, 8)}, "weight: every size must be at least 1, got [0, 3, 8, 8]"),
    (call_patch_embed, {"weight": torch.zeros(16, 3, 8, 8).byte()}, "weight: dtype Byte is not supported; accepted: "),
    (call_patch_embed, {"bias": torch.zeros(15)}, "bias: expected [16], got [15]"),
    (call_patch_embed, {"pos_embed": torch.zeros(7, 16)}, "pos_embed: expected [6, 16] or [6, 16], got [7, 16]"),
    (call_patch_embed, {"prefix": torch.zeros(1, 15)}, "prefix: expected [R, 16], got [1, 15]"),
    (call_patch_embed, {"keep": torch.zeros(2, 3).int()}, "keep: dtype Int is not supported; accepted: Long"),
    (call_patch_embed, {"keep": torch.zeros(3, 3).long()}, "keep: expected [2, N_keep], got [3, 3]"),
    (call_patch_embed, {"constants": torch.zeros(3, 3)}, "constants: expected [4, 3], got [3, 3]"),
    (call_patch_embed, {"constants": torch.zeros(4, 3).half()}, "constants: dtype Half is not supported; accepted: Fl"),
    (call_patch_embed, {"compute_dtype": torch.uint8}, "compute_dtype: dtype Byte is not supported"),
    (call_patch_embed, {"dtype": torch.int32}, "dtype: dtype Int is not supported"),
    (
        call_patch_embed,
        {"images": torch.zeros(1, 3, 8, 8).expand(2**31 - 1, 3, 8, 8), "prefix": torch.zeros(1, 16)},
        "images: 2147483647 x 2 rows of width 16; rows, and values a sample, must be < 2^31",
    ),
    (
        call_patch_embed,
        {"images": torch.zeros(0, 3, 2**31, 8), "weight": torch.zeros(1, 3, 8, 8)},
        "images: height and width must be < 2^31, got [0, 3, 2147483648, 8]",
    ),
    (
        call_add_position_backward,
        {"grad": torch.zeros(0, 2**16, 2**15)},
        "grad: 0 x 65536 rows of width 32768; rows, and values a sample, must be < 2^31",
    ),
    (call_add_norm, {"residual": torch.zeros(())}, "residual: expected dimensions [..., D], got none"),
    (call_add_norm, {"residual": torch.zeros(2, 5, 16).double()}, "residual: dtype Double is not supported; accepted:"),
    (
        call_add_norm,
        {"residual": torch.zeros(5, 8193)},
        "residual: expected [..., D] with D from 1 to 8192, got rows [5, 8193]",
    ),
    (
        call_add_norm,
        {"residual": torch.zeros(2, 0)},
        "residual: expected [..., D] with D from 1 to 8192, got rows [2, 0]",
    ),
    (call_add_norm, {"branch": torch.zeros(2, 4, 16)}, "branch: expected rows [10, 16] as residual, got [8, 16]"),
    (call_add_norm, {"branch": torch.zeros(2, 5, 16).int()}, "branch: dtype Int is not supported; accepted: Float, Ha"),
    (call_add_norm, {"bias": torch.zeros(15)}, "bias: expected [16], got [15]"),
    (call_add_norm, {"scale": torch.zeros(16, 1)}, "scale: expected 1 dimensions [D], got 2"),
    (call_add_norm, {"keep": torch.zeros(5)}, "keep: expected a value a sample of residual, got [5]"),
    (call_add_norm, {"keep": torch.zeros(2).half()}, "keep: dtype Half is not supported; accepted: Float"),
    (call_add_norm, {"weight": torch.zeros(17)}, "weight: expected [16], got [17]"),
    (call_add_norm, {"norm_bias": torch.zeros(16).double()}, "norm_bias: dtype Double is not supported"),
    (call_add_norm, {"sum_dtype": torch.int32}, "sum_dtype: dtype Int is not supported"),
    (call_add_norm, {"dtype": torch.float64}, "dtype: dtype Double is not supported"),
    (call_add_norm_backward, {"total": torch.zeros(8193)}, "total: expected [..., D] with D from 1 to 8192, got rows"),
    (
        call_add_norm_backward,
        {"d_normed": torch.zeros(9, 16)},
        "d_normed: expected rows [10, 16] as total, got [9, 16]",
    ),
    (call_add_norm_backward, {"d_total": torch.zeros(16)}, "d_total: expected rows [10, 16] as total, got [1, 16]"),
    (call_add_norm_backward, {"branch": torch.zeros(9, 16)}, "branch: expected rows [10, 16] as total, got [9, 16]"),
    (call_add_norm_backward, {"branch": None}, "scale, keep: they belong to the branch, and there is none"),
    (call_add_norm_backward, {"statistics": torch.zeros(2, 9)}, "statistics: expected [2, 10], got [2, 9]"),
    (call_add_norm_backward, {"residual_dtype": torch.uint8}, "residual_dtype: dtype Byte is not supported"),
    (call_backward, {"grad": torch.zeros(2, 7, 16)}, "grad: expected [2, 6, 16], got [2, 7, 16]"),
    (call_backward, {"grad": torch.zeros(2, 6, 16).double()}, "grad: dtype Double is not supported"),
    (call_backward, {"product_grad": torch.zeros(2, 6, 16).half()}, "product_grad: dtype Half is not supported; accep"),
    (call_backward, {"keep": torch.zeros(2, 5).long()}, "grad: expected [2, 5, 16], got [2, 6, 16]"),
    (call_backward, {"rows": -1}, "prefix_rows: -1 is less than 0"),
    (call_backward, {"of_images": torch.zeros(4, 4)}, "constants_of_images: expected [4, 3], got [4, 4]"),
    (call_backward, {"images": random_images(torch.uint8)}, "needs: images of Byte have no gradient"),
)


@pytest.mark.parametrize(("call", "changes", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_argument_is_named(ops: Any, call: Callable, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        call(ops, **changes)
    call(ops)  # and with nothing changed there is no error


HUGE = 2**24  # of patches, and of pixels a patch: more of their products than an address space has


@pytest.mark.parametrize("which", ["result", "copy", "gradient"])
def test_memory_that_is_not_there(ops: Any, which: str) -> None:
    """Each way to allocate says so in the words that fastvit/cuda/call.py knows."""
    with pytest.raises(RuntimeError, match=r"^fastvit: can't allocate \d{15,} bytes: \S"):
        if which == "result":
            call_add_position(ops, tokens=torch.zeros(1).expand(HUGE, 1, HUGE), pos_embed=torch.empty(1, HUGE))
        elif which == "copy":  # of images whose pixels do not lie side by side
            call_patch_embed(ops, images=torch.zeros(1).expand(HUGE, 3, 2**12, 2**12))
        else:
            images, weight = torch.zeros(2**12).expand(HUGE, 1, 2**12, 2**12), torch.empty(1, 1, 2**12, 2**12)
            grad, constants = torch.empty(HUGE, 1, 1), torch.ones(4, 1)
            changes = {"constants": constants, "of_images": constants, "needs": [True, False, False, False]}
            call_backward(ops, grad=grad, product_grad=grad, images=images, weight=weight, **changes)


def test_what_kernels_throw_arrives_with_its_text(ops: Any) -> None:
    # std::invalid_argument, from a primitive that the emulated GPU, of capability 8.0, has not.
    which, operands, sums = 15, (64 + 192) * 64 + 64 * 192, 64 * 192 * 4
    given, out = torch.zeros(operands, dtype=torch.uint8), torch.zeros(sums, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="wgmma float16: not on this device"):
        ops.run_primitive_cuda(which, given, out)


def test_run_primitive(ops: Any) -> None:
    given, out = torch.randint(0, 256, (512,), dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    ops.run_primitive_cuda(0, given, out)  # ldmatrix: the bytes in another order
    assert torch.equal(given.sort().values, out.sort().values) and not torch.equal(given, out)
    for which, tensors, message in (
        (21, (given, out), "which: 21; accepted: 0 to 20"),
        (0, (given[1:], out), "input: expected 512 contiguous bytes, got [511]"),
        (0, (given, torch.zeros(1024, dtype=torch.uint8)[::2]), "output: expected 512 contiguous bytes, got [512]"),
        (0, (given, torch.zeros(513, dtype=torch.uint8)[1:]), "output: its address is not a multiple of 16"),
        (0, (given.float(), out), "input: dtype Float is not supported; accepted: Byte"),
    ):
        with pytest.raises(RuntimeError, match="^" + re.escape(message)):
            ops.run_primitive_cuda(which, *tensors)


# What the library leaves behind, and what it is made of


@pytest.mark.parametrize("tokens", [torch.randn(2, 5, 8), torch.randn(2, 4, 8)], ids=["result", "error"])
def test_no_reference_is_kept(ops: Any, tokens: Tensor) -> None:
    positions, prefix = torch.randn(5, 8), torch.randn(1, 8)
    before = [tensor._use_count() for tensor in (tokens, positions, prefix)]
    for _ in range(3):
        try:
            out = ops.add_position_cuda(sliced(tokens), positions, prefix, BF16)
            assert out._use_count() == 1
        except RuntimeError:
            assert tokens.shape[1] == 4
    assert [tensor._use_count() for tensor in (tokens, positions, prefix)] == before


def test_inputs_are_not_materialised(ops: Any) -> None:
    # A lazy clone shares memory until one side is written; to be read is not to be written.
    tokens = torch.randn(2, 5, 8)
    clone = torch._lazy_clone(tokens)
    ops.add_position_cuda(clone, torch.randn(5, 8), None, F32)
    assert torch._C._is_cow_tensor(clone)


def test_library_speaks_the_stable_abi_alone(host_library: Path) -> None:
    names = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", host_library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert any("torch_call_dispatcher" in name for name in names)
    assert not [name for name in names if re.search(r"\b(at|c10|torch)::", name)]
