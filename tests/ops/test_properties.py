"""Any shape, stride and dtype that the contract allows, found by hypothesis: 3 dtypes × 100 examples an op, mostly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit.backend import triton_is_interpreted
from fastvit.validation import AddPositionCase, Case, PatchEmbedCase
from fastvit.validation.ops.patch_embed_packed import PackedCase
from fastvit.validation.runner import backend_candidate, check_case

DTYPES = ["float32", "bfloat16", "float16"]
small = st.integers(1, 3)
few = settings(max_examples=25) if triton_is_interpreted() else settings()  # a second an example, interpreted


@st.composite
def patch_embed_cases(draw: st.DrawFn) -> PatchEmbedCase:
    grid = draw(st.tuples(small, small))
    patches = grid[0] * grid[1]
    prefix = draw(st.sampled_from([0, 1, 5]))
    return PatchEmbedCase(
        name=f"example {draw(st.integers(0, 1_000_000))}",
        batch=draw(st.integers(0, 3)),
        channels=draw(st.integers(1, 5)),
        grid=grid,
        patch=draw(st.tuples(*(st.sampled_from([1, 2, 3, 4, 7, 8, 14, 16]),) * 2)),
        width=draw(st.sampled_from([1, 2, 7, 16, 48, 63, 64, 80, 193])),
        images=draw(st.sampled_from(["same", "uint8", "float32", "bfloat16", "float16"])),
        layout=draw(st.sampled_from(["nchw", "channels_last", "sliced_batch", "cropped", "transposed"])),
        bias=draw(st.booleans()),
        prefix=prefix,
        positions=draw(st.sampled_from(["none", "patches", "all"])),
        keep=draw(st.none() | st.integers(1, patches)),
        repeat_keep=draw(st.booleans()),
        normalise=draw(st.booleans()),
        parameters=draw(st.sampled_from(["same", "masters", "mixed"])),
        weight_channels_last=draw(st.booleans()),
    )


@st.composite
def add_position_cases(draw: st.DrawFn) -> AddPositionCase:
    return AddPositionCase(
        name=f"example {draw(st.integers(0, 1_000_000))}",
        batch=draw(st.integers(0, 4)),
        patches=draw(st.integers(1, 9)) ** 2,  # square, so that tokens can come from a feature map
        width=draw(st.integers(1, 200)),
        layout=draw(st.sampled_from(["contiguous", "sliced_batch", "sliced_rows", "from_nchw"])),
        prefix=draw(st.sampled_from([0, 1, 5])),
        positions=draw(st.sampled_from(["patches", "all"])),
        parameters=draw(st.sampled_from(["same", "mixed"])),
        out=draw(st.sampled_from([None, "float32"])),
    )


@st.composite
def packed_cases(draw: st.DrawFn) -> PackedCase:
    cut = draw(st.booleans())
    layouts = ["packed", "padded"] if cut else ["nchw", "channels_last", "mixed", "cropped"]
    return PackedCase(
        name=f"example {draw(st.integers(0, 1_000_000))}",
        sizes=tuple(draw(st.lists(st.tuples(small, small), max_size=5))),
        channels=draw(st.integers(1, 4)),
        patch=draw(st.tuples(*(st.sampled_from([1, 2, 3, 7, 8, 14]),) * 2)),
        width=draw(st.sampled_from([7, 16, 48, 63, 193])),  # of fewer values luck decides
        images=draw(st.sampled_from(["same", "uint8", "float32", "bfloat16"])),
        layout=draw(st.sampled_from(layouts)),
        order=draw(st.sampled_from(["CPP", "PPC"])),
        bias=draw(st.booleans()),
        prefix=draw(st.sampled_from([0, 1, 5])),
        positions=draw(st.sampled_from(["none", "grid", "rows"])),
        grid=draw(st.tuples(small, small)),
        filter=draw(st.sampled_from([("bicubic", True, None), ("bilinear", False, True), ("bilinear", True, None)])),
        normalise=draw(st.booleans()),
        parameters=draw(st.sampled_from(["same", "masters", "mixed"])),
    )


def hold(case: Case, backend: str, dtype: str, device: str) -> None:
    rows = check_case(backend_candidate(backend, device), case, dtype)
    assert rows and not [row for row in rows if row.status != "passed"], "\n".join(map(str, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=patch_embed_cases())
def test_patch_embed(case: PatchEmbedCase, backend: str, dtype: str, device: str) -> None:
    hold(case, backend, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=add_position_cases())
def test_add_position(case: AddPositionCase, backend: str, dtype: str, device: str) -> None:
    hold(case, backend, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(case=packed_cases())
def test_patch_embed_packed(case: PackedCase, backend: str, dtype: str, device: str) -> None:
    hold(case, backend, dtype, device)
