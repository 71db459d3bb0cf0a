"""The binding of patch_embed_packed, as test_binding.py holds that of patch_embed there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tests.cuda.test_binding import BF16, BOUND, F16, F32, FLOATS, PIXELS, constants_for, relative

P, D = 4, 16
SIZES = ((8, 12), (4, 4), (12, 8))  # 6, 1 and 6 patches
STARTS = [2, 0, 2]


def table_of(images: Sequence[Tensor], starts: Sequence[int] = STARTS) -> Tensor:
    """[8, B]: first rows, origins, strides of channels and rows, patches in a row, starts, and the order of these."""
    base, size = min(image.data_ptr() for image in images), images[0].element_size()
    is_nhwc = all(image.stride(0) == 1 for image in images)
    counts = [image.shape[1] // P * (image.shape[2] // P) for image in images]
    order = sorted(range(len(images)), key=lambda i: starts[i])
    columns = [
        list(itertools.accumulate(counts, initial=0))[:-1],
        [(image.data_ptr() - base) // size for image in images],
        [0 if is_nhwc else image.stride(0) for image in images],
        [image.stride(1) for image in images],
        [image.shape[2] // P for image in images],
        list(starts), order, sorted(starts),
    ]  # fmt: skip
    return torch.tensor(columns)


def arguments(pixels: torch.dtype = F32, parameters: torch.dtype = F32, **changes: Any) -> dict[str, Any]:
    """Of `patch_embed_packed_cuda`, in its order."""
    images = [(torch.rand(3, *size) * 255).to(pixels) for size in SIZES]
    tables = {"weight": torch.randn(D, 3, P, P), "bias": torch.randn(D), "pos_embed": torch.randn(9, D)}
    given = {name: table.to(parameters) for name, table in {**tables, "prefix": torch.randn(2, D)}.items()}
    rest = {"compute": F32, "dtype": F32, "tf32": False}
    images = changes.get("images", images)
    found = {
        **given,
        "images": images,
        "starts": STARTS,
        "table": table_of(images),
        "constants": constants_for(images[0]),
    }
    return {**found, **rest, **changes}


def in_float64(given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The result; and, where its own gradient is its double, those of weight, bias, prefix and positions."""
    leaves = {name: given[name].double().requires_grad_() for name in ("weight", "bias", "prefix", "pos_embed")}
    weight, bias, prefix, positions = leaves.values()
    tokens = []
    for image, start in zip(given["images"], given["starts"], strict=True):
        pixels = image.double()[None] / (255 if image.dtype == torch.uint8 else 1)
        own = conv2d(pixels, weight, bias, stride=P).flatten(2).mT[0]
        tokens += [prefix, own + positions[start : start + len(own)]]
    out = torch.cat(tokens)
    d_weight, d_bias, d_prefix, d_positions = torch.autograd.grad(out, list(leaves.values()), 2 * out)
    return out, [d_weight, d_bias, torch.cat((d_prefix, d_positions))]


def backward(ops: Any, given: dict[str, Any], **changes: Any) -> Any:
    """Where the gradient of the result is its double."""
    grad = 2 * ops.patch_embed_packed_cuda(*given.values())
    names = ("weight", "images", "starts", "table", "constants", "compute")
    more = {"prefix_rows": 2, "places": 9, "tf32": False, "has_mean": False, "needs": [True, True, True]}
    found = {"grad": grad, "product_grad": grad.to(given["compute"]), **{name: given[name] for name in names}, **more}
    return ops.patch_embed_packed_backward_cuda(*(found | changes).values())


@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("compute", FLOATS, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
def test_every_dtype(ops: Any, pixels: torch.dtype, compute: torch.dtype, out: torch.dtype) -> None:
    given = arguments(pixels, compute=compute, dtype=out)
    found, (expected, gradients) = ops.patch_embed_packed_cuda(*given.values()), in_float64(given)
    bound = max(BOUND[compute], BOUND[out])
    assert found.dtype == out and relative(found, expected) < bound
    for ours, exact in zip(backward(ops, given), gradients, strict=True):
        assert ours.dtype == F32 and relative(ours, exact) < bound


@pytest.mark.parametrize("parameters", [F16, BF16], ids=str)
def test_parameters_of_other_dtypes(ops: Any, parameters: torch.dtype) -> None:
    given = arguments(parameters=parameters)
    assert relative(ops.patch_embed_packed_cuda(*given.values()), in_float64(given)[0]) < BOUND[F32]
    assert backward(ops, given)[0].dtype == parameters


def test_channels_last(ops: Any) -> None:
    images = [torch.randn(*size, 3).permute(2, 0, 1) for size in SIZES]
    given = arguments(images=images)
    assert relative(ops.patch_embed_packed_cuda(*given.values()), in_float64(given)[0]) < BOUND[F32]


def test_only_what_is_needed(ops: Any) -> None:
    given = arguments()
    for place in range(3):
        found = backward(ops, given, needs=[which == place for which in range(3)])
        assert [gradient.numel() > 0 for gradient in found] == [which == place for which in range(3)]


BAD: Sequence[tuple[dict[str, Any], str]] = (
    ({"starts": [0, 0]}, "starts: 2 of them for 3 images"),
    ({"starts": [0, -1, 0]}, "starts: -1 is less than 0"),
    ({"pos_embed": torch.zeros(7, D)}, "pos_embed: expected [8 or more, 16], got [7, 16]"),
    ({"prefix": torch.zeros(1, 15)}, "prefix: expected [R, 16], got [1, 15]"),
    ({"bias": torch.zeros(15)}, "bias: expected [16], got [15]"),
    ({"table": None}, "table: none, by which a GPU finds the images"),
    ({"table": torch.zeros(8, 2).long()}, "table: expected [8, 3], got [8, 2]"),
    ({"table": torch.zeros(8, 3)}, "table: dtype Float is not supported; accepted: Long"),
    ({"constants": torch.zeros(4, 4)}, "constants: expected [4, 3], got [4, 4]"),
    ({"dtype": torch.float64}, "dtype: dtype Double is not supported; accepted: Float, Half, BFl"),
)
IMAGES: Sequence[tuple[list[Tensor], str]] = (
    ([], "images: none"),
    ([torch.zeros(3, 8, 12), torch.zeros(4, 4, 4)], "images: image 1 has 4 channels, but weight expects 3"),
    ([torch.zeros(3, 8, 12), torch.zeros(3, 4, 6)], "images: image 1 of 4 x 6 is not a positive multiple of the patch"),
    ([torch.zeros(3, 8, 12), torch.zeros(3, 8, 12).half()], "images: of several types"),
    ([torch.zeros(3, 8, 12).long()], "images: dtype Long is not supported; accepted: Byte, "),
    ([torch.zeros(3, 8, 24)[:, :, ::2]], "images: image 0 does not lie as all others do"),
)


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_argument_is_named(ops: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        ops.patch_embed_packed_cuda(*arguments(**changes).values())


@pytest.mark.parametrize(("images", "message"), IMAGES, ids=[message[:40] for _, message in IMAGES])
def test_a_bad_image_is_named(ops: Any, images: list[Tensor], message: str) -> None:
    table = torch.zeros(8, max(1, len(images))).long()
    given = arguments() | {"images": images, "starts": STARTS[: len(images)], "table": table}
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        ops.patch_embed_packed_cuda(*given.values())


BAD_GRADIENTS: Sequence[tuple[dict[str, Any], str]] = (
    ({"grad": torch.zeros(18, D)}, "grad: expected [19, 16], got [18, 16]"),
    ({"grad": torch.zeros(19, D).double()}, "grad: dtype Double is not supported"),
    ({"product_grad": torch.zeros(19, D).half()}, "product_grad: dtype Half is not supported; accepted: Float"),
    ({"prefix_rows": -1}, "prefix_rows: -1 is less than 0"),
    ({"needs": [True]}, "needs: expected 3 values, for weight, bias and rows; got 1"),
)


@pytest.mark.parametrize(("changes", "message"), BAD_GRADIENTS, ids=[message[:40] for _, message in BAD_GRADIENTS])
def test_a_bad_argument_of_the_backward_is_named(ops: Any, changes: dict[str, Any], message: str) -> None:
    call: Callable[..., Any] = backward
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        call(ops, arguments(), **changes)
