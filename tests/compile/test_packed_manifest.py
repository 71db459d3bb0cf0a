"""What patch_embed_packed launches is in the manifest, whatever the images, and compiled once for all sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compile.test_manifest import BF16, FLOATS, FP32, HALF, U8, Recorder, recorder  # noqa: F401, the fixture


def call(
    image: torch.dtype = U8,
    weight: torch.dtype = FP32,
    compute: torch.dtype = BF16,
    out: torch.dtype = BF16,
    positions: torch.dtype | None = FP32,
    sizes: tuple[tuple[int, int], ...] = ((2, 3), (1, 1), (4, 2)),
    channels: int = 3,
    patch: tuple[int, int] = (16, 16),
    width: int = 64,
    prefix: int = 1,
    strides: str = "nchw",
    offset: int = 0,
) -> None:
    """Forward and backward on tensors whose values are never read; `offset` moves the images in memory."""
    from fastvit.kernels import patch_embed_packed

    def made(rows: int, columns: int) -> torch.Tensor:
        height, length = rows * patch[0], columns * patch[1]
        flat = torch.empty(channels * height * length + offset, dtype=image)[offset:]
        if strides == "channels_last":
            return flat.view(height, length, channels).permute(2, 0, 1)
        if strides == "cropped":
            return torch.empty(channels, height + 1, length + 7, dtype=image)[:, 1:, 3 : 3 + length]
        return flat.view(channels, height, length)

    images = [made(*size) for size in sizes]
    counts = [rows * columns for rows, columns in sizes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    kernel, mean = torch.empty(width, channels, *patch, dtype=weight), [0.5] * channels
    table = None if positions is None else torch.empty(sum(counts), width, dtype=positions)
    first = torch.empty(prefix, width) if prefix else None
    settings = images, starts, mean, mean, compute
    tokens = patch_embed_packed.forward(kernel, torch.empty(width), table, first, *settings, out)
    assert tokens.shape == (sum(counts) + prefix * len(sizes), width) and tokens.dtype == out
    needs = (False, True, True, True)
    patch_embed_packed.backward(torch.empty_like(tokens), kernel, *settings, prefix, sum(counts), needs)


CALLS = st.fixed_dictionaries(
    {
        "image": st.sampled_from([U8, FP32, BF16, HALF]),
        "weight": FLOATS,
        "compute": FLOATS,
        "out": FLOATS,
        "positions": st.one_of(st.none(), FLOATS),
        "sizes": st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5).map(tuple),
        "channels": st.sampled_from([1, 3, 4, 64]),
        "patch": st.tuples(st.sampled_from([1, 4, 8, 14, 16, 32]), st.sampled_from([1, 4, 8, 14, 16, 32])),
        "width": st.sampled_from([1, 16, 63, 64, 192, 256]),
        "prefix": st.sampled_from([0, 1, 5]),
        "strides": st.sampled_from(["nchw", "channels_last", "cropped"]),
        "offset": st.sampled_from([0, 0, 1, 16]),
    }
)


@settings(max_examples=150)
@given(arguments=CALLS)
def test_only_the_manifest_is_reachable(recorder: Recorder, arguments: dict[str, Any]) -> None:  # noqa: F811
    before = sum(recorder.seen.values())
    call(**arguments)
    assert sum(recorder.seen.values()) > before


def test_common_calls_take_the_fast_kernels(recorder: Recorder) -> None:  # noqa: F811
    for image in (U8, BF16, FP32):
        for strides in ("nchw", "channels_last"):
            for patch, variant in (((16, 16), "wide"), ((32, 32), "wide"), ((14, 14), "masked"), ((8, 8), "masked")):
                recorder.seen.clear()
                call(image=image, patch=patch, strides=strides, width=192)
                products = {entry.kernel: entry.key[0] for entry, _ in recorder.seen if entry.compute}
                slow = variant == "masked" and image is FP32
                assert set(products.values()) == {"generic" if slow else variant}, (strides, image, patch, products)
    for channels in (768, 588):  # patches that are cut already
        recorder.seen.clear()
        call(image=BF16, patch=(1, 1), strides="channels_last", channels=channels, sizes=((1, 6), (1, 1)), width=192)
        found = {entry.key[0] for entry, _ in recorder.seen if entry.compute}
        assert found == {"wide" if channels % 64 == 0 else "masked"}, (channels, found)


def test_no_recompilation_for_other_sizes(recorder: Recorder) -> None:  # noqa: F811
    for sizes, prefix, width in (
        (((1, 1),), 1, 16),
        (((2, 3), (7, 1)), 5, 64),
        (((14, 14), (3, 1), (1, 9)) * 20, 1, 192),
    ):
        call(sizes=sizes, prefix=prefix, width=width)
    assert all(entry.key[0] == "wide" for entry, _ in recorder.seen if entry.compute)
    assert len(recorder.seen) == len({entry for entry, _ in recorder.seen})


@pytest.mark.parametrize("count", [1, 2, 64, 300])
def test_launches_do_not_grow_with_the_images(recorder: Recorder, count: int) -> None:  # noqa: F811
    call(sizes=((2, 3), (1, 4)) * (count // 2) or ((2, 3),))
    assert sum(recorder.seen.values()) == 3 + 4  # forward, backward
