"""Raw uint8 images in an accelerated model, against the library's model on normalised floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.interop.comparing import Pair, bfloat16_gradients, bfloat16_outputs, float32_errors, normalised, worst_output
from tests.interop.subjects import entry as entry_named
from tests.interop.zoo import ENTRIES, Entry, Size

TAKE_UINT8 = [entry for entry in ENTRIES if entry.uint8]

EACH_MIXIN = [
    "timm-vit",
    "timm-dinov3",
    "timm-beit-positions",
    "timm-naflexvit-linear",
    "timm-swin",
    "timm-twins-svt",
    "torchvision-vit",
    "transformers-vit",
    "transformers-beit",
    "transformers-dinov2-registers",
    "transformers-dinov3",
    "transformers-vit-mae",
    "transformers-clip",
    "transformers-siglip",
    "transformers-idefics3",
    "transformers-pixtral",
]

every_entry = pytest.mark.parametrize("entry", TAKE_UINT8, ids=str)


def raw(entry: Entry, size: Size, batch: int = 2) -> Tensor:
    """[B, C, H, W]"""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, entry.channels, *size), dtype=torch.uint8, generator=generator)


@every_entry
def test_outputs_and_gradients(entry: Entry) -> None:
    """Within 1e-5 and 1e-4, in eval and train mode, at every size."""
    pair = Pair.of(entry, raw=True)
    for size in entry.sizes:
        for train in (False, True):
            pair.train(train)
            pixels = raw(entry, size)
            float32_errors(pair, normalised(pixels, entry).float(), pixels)


@pytest.mark.parametrize("name", EACH_MIXIN)
def test_any_layout(name: str) -> None:
    """NHWC, whether batch, rows and pixels follow one another in memory or not; and floats, as before."""
    known = entry_named(name)
    pair = Pair.of(known, raw=True)
    pixels = raw(known, known.sizes[-1], batch=3)
    floats = normalised(pixels, known).float()
    want = pair.want(floats)
    rows = pixels.permute(0, 2, 3, 1)  # [B, H, W, C]
    layouts = {
        "NHWC": rows.contiguous(),
        "a view of NCHW as NHWC": rows,
        "channels_last": pixels.contiguous(memory_format=torch.channels_last),
        "every second image": pixels.repeat_interleave(2, dim=0)[::2],
        "floats": floats,
    }
    for name, images in layouts.items():
        try:
            worst_output(pair.got(images), want)
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure


@pytest.mark.parametrize("name", EACH_MIXIN)
def test_bfloat16_autocast(name: str) -> None:
    """Pixels are exact where normalised floats are rounded: at most twice the library's own error against float64."""
    known = entry_named(name)
    pixels = raw(known, known.sizes[0], batch=32)
    _, found = bfloat16_outputs(Pair.of(known, raw=True), normalised(pixels, known), pixels)
    bfloat16_gradients(found)


def test_few_columns_are_no_channels() -> None:
    """An image of three columns and three channels is NCHW; of two shapes that fit, the channels in front count."""
    padded = entry_named("timm-vit-dynamic-size-pad")
    pair = Pair.of(padded, raw=True)
    pixels = raw(padded, (16, 3))
    worst_output(pair.got(pixels), pair.want(normalised(pixels, padded).float()))
