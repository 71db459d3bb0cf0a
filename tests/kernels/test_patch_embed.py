"""patch_embed, forward and backward, over the awkward cases: against float64, whole and by the worst slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

U8, HALF, BF16, FP32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
DTYPES = [(image, compute) for compute in (BF16, HALF, FP32) for image in (U8, BF16, HALF, FP32)]


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={value[key]}" for key in value).replace("torch.", "").replace(" ", "") or "default"
    return str(value).replace("torch.", "")


@pytest.mark.parametrize(("image", "compute"), DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [63, 64])
def test_dtypes(check: Callable, image: torch.dtype, compute: torch.dtype, width: int) -> None:
    """Width 64 takes the variant for patch 8 or 14 where there is one, width 63 the generic kernels."""
    check(image=image, compute=compute, patch=(8, 8), channels=2, width=width, batch=1, grid=(2, 2), prefix=0)


@pytest.mark.parametrize(
    "changes",
    [
        dict(image=U8),
        dict(image=BF16, prefix=5, positions="all"),
        dict(image=FP32, prefix=0),
        dict(image=U8, compute=HALF, weight=HALF),
        dict(image=HALF, compute=HALF, normalise=False),
        dict(image=FP32, compute=HALF),
        dict(image=U8, out=FP32, weight=BF16),
        dict(image=U8, compute=FP32),
        dict(image=FP32, compute=FP32),
        dict(image=U8, layout="channels_last", channels=3, grid=(1, 2)),
        dict(image=FP32, layout="channels_last", channels=2, grid=(2, 1)),
        dict(image=U8, patch=(32, 32), grid=(1, 2), batch=1),
        dict(image=BF16, patch=(4, 16), channels=3, width=192),
        dict(image=BF16, keep=4),
        dict(image=U8, keep=4, prefix=5, layout="channels_last", channels=2, patch=(8, 16)),
    ],
    ids=name_of,
)
def test_patches_of_16(check: Callable, changes: dict[str, Any]) -> None:
    check(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        dict(width=256),
        dict(width=256, image=BF16, prefix=5),
        dict(width=192),
        dict(width=256, grid=(6, 4)),
        dict(width=80, image=FP32, out=FP32, keep=5),
        dict(width=128, image=FP32, compute=FP32),
        dict(width=144, image=HALF, compute=HALF),
    ],
    ids=name_of,
)
def test_big_tiles(check: Callable, big_tiles: None, changes: dict[str, Any]) -> None:
    """Tiles of 128 rows and 128 or 256 columns: more of each than there are, so that every edge is inside a tile."""
    check(**{"patch": (4, 16), "batch": 3, **changes})


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    "patch", [(2, 2), (4, 4), (7, 7), (8, 8), (14, 14), (4, 6), (9, 5), (14, 2), (1, 3)], ids=name_of
)
def test_patches(check: Callable, patch: tuple[int, int], layout: str) -> None:
    check(patch=patch, layout=layout, channels=3, image=FP32 if patch[0] % 2 else U8)


@pytest.mark.parametrize("layout", ["sliced_batch", "cropped", "transposed"])
@pytest.mark.parametrize(("image", "patch"), [(U8, (8, 8)), (BF16, (14, 14)), (FP32, (5, 3))], ids=name_of)
def test_strides(check: Callable, image: torch.dtype, patch: tuple[int, int], layout: str) -> None:
    check(image=image, patch=patch, layout=layout, channels=2)


@pytest.mark.parametrize(
    "changes",
    [
        dict(width=1, prefix=0),
        dict(width=63, prefix=5),
        dict(width=193),
        dict(width=16, bias=False),
        dict(bias=False, positions="none", prefix=0),
        dict(positions="none"),
        dict(prefix=5, positions="all"),
        dict(normalise=False, image=FP32),
        dict(normalise=False),
        dict(batch=1, grid=(1, 1)),
        dict(batch=1, grid=(1, 1), prefix=0, channels=1, patch=(2, 2), width=1),
        dict(grid=(7, 1)),
        dict(grid=(2, 4), batch=3),  # several rounds over the batch, a few patches of every image in each
        dict(grid=(4, 3), batch=7, prefix=5, positions="all", layout="channels_last"),
        dict(grid=(2, 4), batch=3, keep=8, image=FP32),
        dict(grid=(1, 7), layout="channels_last", channels=4),
        dict(channels=1, layout="channels_last"),
        dict(channels=13, patch=(2, 2)),
        dict(batch=70, patch=(2, 2), width=16),
        dict(weight=BF16, compute=BF16, image=BF16),
        dict(weight=HALF, compute=FP32, image=FP32),
        dict(weight=BF16, compute=HALF, image=FP32, out=FP32),
        dict(keep=3, width=63, positions="all", prefix=5),
        dict(keep=9, image=FP32),
        dict(keep=1, batch=1, image=FP32, prefix=0, layout="cropped"),
        dict(keep=5, image=FP32, patch=(8, 8), compute=FP32, layout="channels_last", channels=2),
    ],
    ids=name_of,
)
def test_awkward(check: Callable, changes: dict[str, Any]) -> None:
    check(**{"patch": (4, 4), "channels": 2, **changes})


@contextmanager
def convolutions_at(precision: str) -> Iterator[None]:
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = precision
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@pytest.mark.parametrize("width", [16, 17])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision_follows_torch(check: Callable, monkeypatch: pytest.MonkeyPatch, precision: str, width: int) -> None:
    """fp32 products are made as torch's convolutions make them."""
    from fastvit.kernels import launch

    used, run = set(), launch.launch
    monkeypatch.setattr(launch, "launch", lambda entry, *a, **k: (used.add(entry), run(entry, *a, **k)))
    with convolutions_at(precision):
        check(image=FP32, compute=FP32, patch=(4, 16), width=width, batch=1)
    assert {entry.constant("PRECISION") for entry in used if entry.compute} == {precision}


@pytest.fixture
def _tf32() -> Iterator[None]:
    with convolutions_at("tf32"):
        yield


def _nearest(values: Tensor) -> Tensor:
    """The nearest values that TF32 has, ties away from zero."""
    bits = values.cpu().numpy().view("uint32").astype("uint64")
    nearest = ((bits + 0x1000) & 0xFFFFE000).astype("uint32").view("float32")
    return torch.from_numpy(nearest).to(values.device)


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("patch", [(4, 4), (4, 16)], ids=str)
@pytest.mark.parametrize("width", [16, 17])
def test_tf32_takes_the_nearest_value_of_every_operand(
    make: Callable, forward: Callable, backward: Callable, width: int, patch: tuple[int, int]
) -> None:
    """Products with ones and zeros: what is left is the other operand, as it was multiplied."""
    patches, length = 2 * width, patch[0] * patch[1]
    bare = dict(normalise=False, bias=False, positions="none", prefix=0, image=FP32, channels=1)
    inputs = make(grid=(2, width), width=width, batch=1, patch=patch, **bare)
    one_of = [torch.eye(n, k, device=inputs["weight"].device) for n, k in ((width, length), (patches, width))]
    needs, few = (True, True, False, False), min(width, length)

    def rows_of(images: Tensor) -> Tensor:
        return F.unfold(images, patch, stride=patch)[0].T  # [N, K]

    def gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
        d_images, d_weight, *_ = backward(grad[None], inputs, FP32, needs)
        return rows_of(d_images), d_weight.view(width, length)

    grad = torch.randn(patches, width, device=inputs["weight"].device)
    weight, pixels = inputs["weight"].view(width, length), rows_of(inputs["images"])
    assert not any(values.equal(_nearest(values)) for values in (grad, weight, pixels))

    inputs.tensors["weight"] = one_of[0].view(width, 1, *patch)
    assert forward(inputs, FP32, FP32)[0, :, :few].equal(_nearest(pixels)[:, :few])
    assert gradients(grad)[0][:, :few].equal(_nearest(grad)[:, :few])
    assert gradients(one_of[1])[1].equal(_nearest(pixels)[:width])

    inputs.tensors["weight"] = weight.view(width, 1, *patch)
    assert gradients(one_of[1])[0][:width].equal(_nearest(weight))
    single = torch.eye(patches, length, device=weight.device)
    inputs.tensors["images"] = F.fold(single.T[None], inputs["images"].shape[2:], patch, stride=patch)
    known = min(patches, length)
    assert forward(inputs, FP32, FP32)[0, :known].equal(_nearest(weight).T[:known])
    assert gradients(grad)[1].T[:known].equal(_nearest(grad)[:known])


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("width", [16, 17])
def test_tf32_keeps_what_is_not_finite(make: Callable, forward: Callable, width: int) -> None:
    """A NaN whose bits are all ones, as arithmetic on a GPU makes them, would become a zero when rounded."""
    inputs = make(image=FP32, patch=(4, 16), width=width, batch=3, prefix=1)
    values = torch.tensor([0x7FFFFFFF, -1, 0x7F800000], dtype=torch.int32, device=inputs["images"].device)
    inputs["images"][:, 0, 0, 0] = values.view(torch.float32)
    tokens = forward(inputs, FP32, FP32)
    assert tokens[:2, 1].isnan().all() and not tokens[2, 1].isfinite().any()
    assert tokens[:, 2:].isfinite().all()


@pytest.mark.parametrize("image", [U8, FP32], ids=name_of)
@pytest.mark.parametrize("width", [16, 17])
def test_same_inputs_same_bits(
    make: Callable, forward: Callable, backward: Callable, width: int, image: torch.dtype
) -> None:
    inputs = make(image=image, patch=(8, 8), channels=2, width=width, keep=5, batch=3)
    first, second = (forward(inputs, BF16, BF16) for _ in range(2))
    assert torch.equal(first, second)
    needs = (image == FP32, True, True, True)
    gradients = [backward(first, inputs, BF16, needs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_splits_do_not_change_the_sum(check: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows for several slices of the weight gradient, the last one partly filled."""
    from fastvit.kernels import launch

    splits, run = [], launch.launch

    def spy(entry: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if entry.kernel == "patch_embed_weight_gradient":
            splits.append(grid[1])
        run(entry, grid, **arguments)

    monkeypatch.setattr(launch, "launch", spy)
    check(batch=40, grid=(2, 3), patch=(2, 2), width=17)
    check(batch=40, grid=(3, 5), patch=(4, 16), width=16, image=BF16)
    assert min(splits) > 1


@pytest.mark.parametrize(
    ("shape", "rides"),
    [
        ((256, 197, 768), True),
        ((4096, 197, 768), True),
        ((2000, 5, 64), False),
        ((8, 5, 64), True),
        ((0, 5, 64), False),
    ],
)
def test_rows_are_summed_beside_the_product_unless_few_programs_would(shape: tuple[int, ...], rides: bool) -> None:
    from fastvit.kernels.patch_embed import _may_ride

    assert _may_ride(torch.empty(shape, device="meta")) is rides


def test_keep_out_of_range(make: Callable, forward: Callable, backward: Callable) -> None:
    """Such a token is NaN, and neither it nor its gradient reaches anything else."""
    for width, patch in ((16, (8, 8)), (17, (4, 4))):
        inputs = make(image=FP32, patch=patch, width=width, batch=2, grid=(2, 2), keep=4, prefix=1)
        assert inputs.keep is not None
        inputs.keep[0] = torch.tensor([1, -1, 3, 1])
        inputs.keep[1] = torch.tensor([4, 2, 2**40, 0])
        bad = torch.tensor([[False, True, False, False], [True, False, True, False]], device=inputs.keep.device)
        tokens = forward(inputs, BF16, BF16)
        assert tokens[:, 1:][bad].isnan().all() and tokens[:, 1:][~bad].isfinite().all()
        assert tokens[:, 0].isfinite().all()

        grad = torch.randn(tokens.shape, device=tokens.device).to(BF16)
        needs = (True, True, True, True)
        found = backward(grad, inputs, BF16, needs)
        silent = grad.clone()
        silent[:, 1:][bad] = 0
        inputs.keep[bad] = 0
        expected = backward(silent, inputs, BF16, needs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            assert ours.isfinite().all()


@pytest.mark.parametrize("changes", [dict(batch=0), dict(keep=0), dict(keep=0, prefix=0)], ids=name_of)
def test_empty(make: Callable, forward: Callable, backward: Callable, changes: dict[str, Any]) -> None:
    for image in (U8, FP32):
        inputs = make(image=image, patch=(4, 4), **changes)
        kept = 6 if inputs.keep is None else 0
        prefix = inputs.copied
        tokens = forward(inputs, BF16, FP32)
        assert tokens.shape == (inputs["images"].shape[0], prefix + kept, 64)
        assert not prefix or torch.equal(tokens[:, 0], inputs["prefix"].expand(len(tokens), -1))
        grad = torch.ones_like(tokens)
        d_images, d_weight, d_bias, d_rows = backward(grad, inputs, BF16, (image == FP32, True, True, True))
        assert d_weight.shape == inputs["weight"].shape and not d_weight.any()
        assert d_bias.shape == (64,) and not d_bias.any()
        assert d_rows.shape == (prefix + 6, 64) and not d_rows[prefix:].any()
        assert image == U8 or (d_images.shape == inputs["images"].shape and not d_images.any())


def test_gradients_not_needed_have_size_0(make: Callable, backward: Callable) -> None:
    inputs = make(image=FP32, patch=(4, 4))
    grad = torch.randn(2, 7, 64, device=inputs["images"].device)
    every = backward(grad, inputs, FP32, (True,) * 4)
    for wanted in range(4):
        found = backward(grad, inputs, FP32, tuple(place == wanted for place in range(4)))
        for place, gradient in enumerate(found):
            assert torch.equal(gradient, every[place]) if place == wanted else gradient.numel() == 0


def test_gradient_of_any_strides_and_dtype(make: Callable, backward: Callable) -> None:
    """Autograd hands over expanded and sliced gradients."""
    inputs = make(image=FP32, patch=(8, 8))
    needs = (True,) * 4
    value = torch.randn(1, 1, 64, device=inputs["images"].device).to(BF16)
    for ours, theirs in zip(
        backward(value.expand(2, 7, 64), inputs, BF16, needs),
        backward(value.expand(2, 7, 64).contiguous().float(), inputs, BF16, needs),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_batches_beyond_2_31_elements(device: str) -> None:
    """The second image starts past 2^31: an offset of 32 bits would wrap. The memory between is never touched."""
    from fastvit.kernels import patch_embed

    stride = 2**31 + 64
    storage = torch.empty(stride + 64, dtype=torch.uint8, device=device)
    images = storage.as_strided((2, 1, 8, 8), (stride, 64, 8, 1))
    images.copy_(torch.randint(0, 256, images.shape, dtype=torch.uint8))
    weight = torch.randn(16, 1, 8, 8, device=device)
    arguments = (weight, None, None, None, None, None, None, BF16, BF16)
    assert torch.equal(patch_embed.forward(images, *arguments), patch_embed.forward(images.clone(), *arguments))
    grad = torch.randn(2, 1, 16, device=device).to(BF16)
    needs = (False, True, False, False)
    found = patch_embed.backward(grad, images, weight, None, None, None, BF16, 0, needs)
    expected = patch_embed.backward(grad, images.clone(), weight, None, None, None, BF16, 0, needs)
    assert torch.equal(found[1], expected[1])
