"""patch_embed_packed by every variant of its kernels, against float64, and that it is the variant that is meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit.validation import make_inputs
from fastvit.validation.ops.patch_embed_packed import PackedCase
from fastvit.validation.report import FAILED
from fastvit.validation.runner import backend_candidate, check_inputs
from tests.kernels.test_patch_embed import convolutions_at

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The entries that are launched."""
    from fastvit.kernels import launch

    found: list[Any] = []
    shipped = launch.launch

    def noted(entry: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        found.append(entry)
        shipped(entry, grid, **arguments)

    monkeypatch.setattr(launch, "launch", noted)
    return found


@pytest.mark.parametrize(
    ("variant", "compute", "changes"),
    [
        ("wide", BF16, dict(images="uint8", normalise=True)),
        ("wide", BF16, dict(images="uint8", normalise=True, parameters="masters", prefix=0, width=272)),
        ("wide", BF16, dict(layout="channels_last", parameters="mixed", patch=(4, 16))),
        ("wide", BF16, dict(images="float32", normalise=True, parameters="masters")),
        ("wide", HALF, dict(images="uint8", normalise=True, out="float32", parameters="mixed")),
        ("wide", HALF, dict(images="float32", parameters="masters", prefix=5, layout="channels_last")),
        ("wide", FP32, dict(channels=1)),
        ("wide", BF16, dict(layout="packed", channels=4, patch=(8, 8), positions="rows")),
        ("wide", HALF, dict(layout="padded", channels=4, patch=(8, 8), images="uint8", order="PPC")),
        ("masked", BF16, dict(images="uint8", patch=(14, 14), normalise=True, parameters="masters")),
        ("masked", BF16, dict(patch=(14, 14), layout="channels_last", channels=2, parameters="mixed")),
        ("generic", BF16, dict(patch=(16, 16), layout="cropped")),
        ("generic", BF16, dict(width=63, out="float32")),
        ("generic", HALF, dict(images="bfloat16", layout="mixed", patch=(5, 3))),
        ("generic", FP32, dict(images="uint8", normalise=True, layout="packed", patch=(4, 4))),
        ("generic", FP32, dict(images="float16", positions="none", prefix=0, bias=False)),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else str(value)[-8:],
)  # fmt: skip
def test_variants(
    device: str, launched: list[Any], variant: str, compute: torch.dtype, changes: dict[str, Any]
) -> None:
    # At float32's own precision there are generic kernels alone.
    with convolutions_at("tf32" if (variant, compute) == ("wide", FP32) else "ieee"):
        _check(device, variant, compute, launched, changes)


def _check(device: str, variant: str, compute: torch.dtype, launched: list[Any], changes: dict[str, Any]) -> None:
    case = PackedCase("kernels", **{"width": 144, "patch": (16, 16), "sizes": ((2, 3), (1, 1), (5, 4)), **changes})
    inputs = make_inputs(case, compute, device)
    rows = check_inputs(backend_candidate("triton", device), "patch_embed_packed", inputs)
    assert rows and not [row for row in rows if row.status == FAILED], "\n".join(map(str, rows))
    forward = [entry.key[0] for entry in launched if entry.kernel == "packed_forward"]
    assert forward == [variant]


def test_positions_that_overlap(device: str) -> None:
    """Images may share some positions, whatever the order of their starts; each is the sum over all that have it."""
    from fastvit.kernels import patch_embed_packed

    weight = torch.randn(40, 1, 2, 2, device=device)
    shapes = [(8, 10), (4, 4), (6, 12), (2, 2), (8, 8)] * 3  # 20, 4, 18, 1 and 16 patches
    starts = [7, 30, 0, 30, 21, 0, 1, 2, 33, 18, 50, 51, 3, 0, 7]
    images = [torch.randn(1, *shape, device=device) for shape in shapes]
    counts = [height * width // 4 for height, width in shapes]
    grad = torch.randn(sum(counts) + 2 * len(counts), 40, device=device)
    needs = (False, False, True, True)
    found = patch_embed_packed.backward(grad, weight, images, starts, None, None, FP32, 2, 80, needs)
    expected = torch.zeros(82, 40, dtype=torch.float64, device=device)
    for own, start, count in zip(grad.double().split([2 + n for n in counts]), starts, counts, strict=True):
        expected[:2] += own[:2]
        expected[2 + start : 2 + start + count] += own[2:]
    torch.testing.assert_close(found[3].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2].double(), expected[2:].sum(0), rtol=1e-5, atol=1e-5)


def test_more_images_than_a_program_has_rows(device: str) -> None:
    """Rows of a hundred images of one patch in a tile, in an order of memory that is not that of the list."""
    from fastvit.kernels import patch_embed_packed

    memory = torch.randn(100, 3, 2, 2, device=device)
    order = torch.randperm(100).tolist()
    images: list[Tensor] = [memory[i] for i in order]
    weight, starts = torch.randn(16, 3, 2, 2, device=device), list(range(100))
    positions = torch.randn(100, 16, device=device)
    tokens = patch_embed_packed.forward(weight, None, positions, None, images, starts, None, None, FP32, FP32)
    expected = memory[order].double().flatten(1) @ weight.double().flatten(1).T + positions
    torch.testing.assert_close(tokens.double(), expected, rtol=2e-3, atol=2e-3)


PIXELS = [  # shapes and strides
    ((8, 5, 1), (1, 32, 8)), ((1, 3, 1), (1, 4, 1)), ((48, 1, 4), (1, 0, 48)), ((48, 3, 1), (1, 48, 7)),
    ((6, 1, 3), (1, 0, 13)),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "strides"), PIXELS)
def test_pixels_that_are_patches_wherever_they_lie(device: str, shape: Any, strides: Any) -> None:
    """Columns and rows of pixels, side by side or not: read as patches that have rows, or as they are."""
    from fastvit.kernels import patch_embed_packed

    image = torch.randn(500, device=device).as_strided(shape, strides, 3)
    weight = torch.randn(16, shape[0], 1, 1, device=device)
    starts = [0, 0]
    images = [image, image.clone()]
    tokens = patch_embed_packed.forward(weight, None, None, None, images, starts, None, None, FP32, FP32)
    expected = (weight.flatten(1).double() @ image.flatten(1).double()).T.repeat(2, 1)
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-4, atol=1e-4)
