"""A launch can reach nothing but the manifest, and never compiles again for another size.

Launches are recorded rather than run: Triton's own binder, for a GPU that need not be there, says what each would be
compiled for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit import tuning

U8, HALF, BF16, FP32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32


class Recorder:
    """Stands in for launch.launch: notes each entry and what Triton would specialise on."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[Any, str]] = Counter()
        self.binders: dict[int, Any] = {}

    def __call__(self, entry: Any, grid: tuple[int, ...], *, reads: Any = (), **arguments: Any) -> None:
        assert all(size > 0 for size in grid) and grid[0] < 2**31 and max((*grid[1:], 0)) < 2**16
        from fastvit.kernels.launch import jit_function

        function = jit_function(entry)
        options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
        _, specialisation, _ = self.binder(function)(**arguments, **entry.constants_by_name, **options)
        assert _as_compiled(specialisation, function) == _as_in_manifest(entry, function), entry.name
        self.seen[entry, str(specialisation)] += 1

    def binder(self, function: Any) -> Any:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        if id(function) not in self.binders:
            backend = make_backend(GPUTarget("cuda", 90, 32))
            self.binders[id(function)] = create_function_from_signature(function.signature, function.params, backend)
        return self.binders[id(function)]


def _as_compiled(specialisation: list[Any], function: Any) -> list[tuple[str, Any, bool]]:
    """(parameter, type or constant, divisible by 16) of each parameter, as Triton sees a launch."""
    found = []
    for parameter, (kind, value) in zip(function.params, specialisation, strict=True):
        found.append((parameter.name, value if kind == "constexpr" else kind, kind != "constexpr" and value == "D"))
    return found


def _as_in_manifest(entry: Any, function: Any) -> list[tuple[str, Any, bool]]:
    from fastvit.kernels.compile_check import specialisation

    signature, attributes, constants = specialisation(entry, function)
    return [
        (name, constants.get(name, kind), (place,) in attributes)
        for place, (name, kind) in enumerate(signature.items())
    ]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    from fastvit.kernels import launch

    recorder = Recorder()
    monkeypatch.setattr(launch, "launch", recorder)
    return recorder


def call(
    image: torch.dtype = U8,
    weight: torch.dtype = FP32,
    compute: torch.dtype = BF16,
    out: torch.dtype = BF16,
    grad: torch.dtype = BF16,
    batch: int = 2,
    channels: int = 3,
    patch: tuple[int, int] = (16, 16),
    grid: tuple[int, int] = (2, 2),
    width: int = 64,
    prefix: int = 1,
    keep: int | None = None,
    strides: str = "nchw",
    offset: int = 0,
) -> None:
    """Forward and backward of patch_embed, and add_position, on tensors whose values are never read."""
    from fastvit.kernels import add_position, patch_embed

    height, columns = grid[0] * patch[0], grid[1] * patch[1]
    size = batch * channels * height * columns
    images = torch.empty(size + offset, dtype=image)[offset:].view(batch, channels, height, columns)
    if strides == "channels_last":
        images = images.view(batch, height, columns, channels).permute(0, 3, 1, 2)
    elif strides == "cropped":
        images = torch.empty(batch, channels, height + 1, columns + 7, dtype=image)[:, :, 1:, 3 : 3 + columns]
    kernel = torch.empty(width, channels, *patch, dtype=weight)
    patches = grid[0] * grid[1]
    pos, first = torch.empty(patches, width), torch.empty(prefix, width) if prefix else None
    indices = torch.zeros(batch * keep + 1, dtype=torch.int64)[1:].view(batch, keep) if keep is not None else None
    mean = [0.5] * channels
    tokens = patch_embed.forward(images, kernel, torch.empty(width), pos, first, indices, mean, mean, compute, out)
    assert tokens.dtype == out
    gradient = torch.empty(tokens.numel() + offset, dtype=grad)[offset:].view(tokens.shape)
    needs = (images.is_floating_point(), True, True, True)
    patch_embed.backward(gradient, images, kernel, indices, mean, mean, compute, prefix, needs)
    add_position.forward(
        gradient[:, prefix:] if keep is None else gradient,
        torch.empty(tokens.shape[1] - (prefix if keep is None else 0), width),
        first if keep is None else None,
        out,
    )


def test_every_entry_has_a_name_of_its_own() -> None:
    from fastvit.kernels import manifest

    entries = manifest.entries()
    assert len({entry.name for entry in entries}) == len(entries)
    tensor_core = [entry for entry in entries if entry.compute and "generic" not in entry.key]
    assert len(tensor_core) <= 90


FLOATS = st.sampled_from([FP32, BF16, HALF])
CALLS = st.fixed_dictionaries(
    {
        "image": st.sampled_from([U8, FP32, BF16, HALF]),
        "weight": FLOATS,
        "compute": FLOATS,
        "out": FLOATS,
        "grad": FLOATS,
        "batch": st.sampled_from([1, 2, 3]),
        "channels": st.sampled_from([1, 3, 4]),
        "patch": st.tuples(st.sampled_from([1, 4, 8, 14, 16, 32]), st.sampled_from([1, 4, 8, 14, 16, 32])),
        "grid": st.sampled_from([(1, 1), (2, 3), (16, 16)]),
        "width": st.sampled_from([1, 16, 63, 64, 192, 256]),
        "prefix": st.sampled_from([0, 1, 5]),
        "keep": st.sampled_from([None, 1, 16]),
        "strides": st.sampled_from(["nchw", "channels_last", "cropped"]),
        "offset": st.sampled_from([0, 0, 1, 16]),
    }
)
CONFIGURATIONS = st.fixed_dictionaries(
    {
        "tile": st.sampled_from([None, "large", "medium", "small", "tf32", "generic", "no such tile"]),
        "programs": st.sampled_from([None, 1, 7, 528, 2**15]),
        "weight_tile": st.sampled_from([None, "large", "medium", "no such tile"]),
    }
)


@pytest.fixture
def small_waves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fastvit.kernels import patch_embed_forward

    monkeypatch.setattr(patch_embed_forward, "MINIMUM_WAVE", 4)
    yield


@settings(max_examples=150)
@given(arguments=CALLS, configuration=CONFIGURATIONS)
def test_only_the_manifest_is_reachable(
    recorder: Recorder, small_waves: None, arguments: dict[str, Any], configuration: dict[str, Any]
) -> None:
    """The recorder fails on a launch that Triton would compile for anything but its entry."""
    before = sum(recorder.seen.values())
    with tuning.forced_configuration(**configuration):
        call(**arguments)
    assert sum(recorder.seen.values()) > before


PRODUCTS = [("ieee", BF16), ("ieee", HALF), ("ieee", FP32), ("tf32", FP32)]


@pytest.mark.parametrize("variant", ["wide", "narrow", "masked", "generic"])
def test_a_preferred_tile_is_taken_where_there_is_one(variant: str) -> None:
    from fastvit.kernels.patch_embed_forward import ENTRIES, TILES, entry_for, tiles_for

    preferred = 0
    for precision, compute in PRODUCTS:
        for image in (U8, BF16, HALF, FP32):
            for out in (compute, FP32):
                types = (variant, image, compute, out, precision)
                for width in (192, 256):
                    tiles = tiles_for(*types, width)
                    default = entry_for(*types, 10_000, width)
                    assert (default in tiles.values()) if tiles else default is None
                    assert set(tiles.values()) <= set(ENTRIES.values())
                    assert width % 256 == 0 or "large" not in tiles
                    for name in (*TILES, "no such tile"):
                        found = entry_for(*types, 10_000, width, name)
                        assert found == tiles.get(name, default)
                        preferred += found != default
    assert preferred > 0 or variant != "wide"


def test_patch_16_takes_the_fast_kernels(recorder: Recorder) -> None:
    """No common call falls to the generic kernels unseen."""
    for strides in ("nchw", "channels_last"):
        for image in (U8, BF16, FP32):
            for patch, variant in (((16, 16), "wide"), ((32, 32), "wide"), ((8, 8), "narrow"), ((14, 14), "masked")):
                recorder.seen.clear()
                call(image=image, patch=patch, strides=strides, width=192, keep=3)
                products = {e.kernel: e.key[0] for e, _ in recorder.seen if e.compute and "image" not in e.kernel}
                assert set(products.values()) == {variant}, (strides, image, patch, products)
    for image in (U8, HALF, FP32):
        recorder.seen.clear()
        call(image=image, compute=HALF, out=HALF, grad=HALF)
        assert {entry.key[0] for entry, _ in recorder.seen if entry.compute} == {"wide"}


def test_no_recompilation_for_another_size(recorder: Recorder) -> None:
    """Batch, image size, channels, patches, width and keep change; what Triton compiles for does not."""
    sizes = [
        dict(batch=batch, grid=grid, channels=channels, width=width, keep=keep, prefix=prefix)
        for batch, grid, channels, width, keep, prefix in [
            (1, (1, 1), 1, 16, None, 1),
            (2, (1, 2), 3, 64, 1, 1),
            (3, (14, 14), 3, 192, 49, 5),
            (16, (16, 16), 4, 64, None, 16),
            (17, (3, 1), 16, 128, 16, 17),
        ]
    ]
    for image, strides in ((U8, "nchw"), (FP32, "channels_last")):
        recorder.seen.clear()
        for arguments in sizes:
            call(image=image, strides=strides, **arguments)
        variants = Counter(entry for entry, _ in recorder.seen)
        assert set(variants.values()) == {1}
        products = Counter((entry.kernel, "keep" in entry.key) for entry in variants if entry.compute)
        assert set(products.values()) == {1}, products  # of the weight gradient one with keep and one without
