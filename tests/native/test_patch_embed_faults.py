"""Faults planted in the processor's own patch embedding and products: the comparison with float64 catches each."""

from __future__ import annotations

import pytest
import torch

from fastvit.validation import PatchEmbedCase
from fastvit.validation.cases import cases_for
from tests.native.planted import Fault

# Small ones of each kind, and one of several blocks of rows, parts of the outputs and panels of the pixels.
NAMES = (
    "raw photograph, ImageNet normalisation", "keep, repeated patches, raw", "fp32 images, normalised",
    "cropped view, five channels, patch 7", "width 63, channels last, no bias", "three sizes, raw, class token",
    "sizes that repeat",
)  # fmt: skip
PARTS = PatchEmbedCase("parts", batch=5, width=800, grid=(6, 6), patch=(8, 8), images="uint8", normalise=True)
OPS = ("patch_embed", "patch_embed_packed", "add_position")
CASES = tuple(
    (case, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for case in (*(case for op in OPS for case in cases_for(op, large=False) if case.name in NAMES), PARTS)
)

EMBED, PATCHES, PRODUCT = "embedding.h", "patches.h", "product.h"
FAULTS = (
    Fault("the bias dropped", EMBED, "load(bias_ + column + j)", "Floats{}"),
    Fault("the mean dropped", EMBED, "bias + sum(correction)", "bias"),
    Fault("the position of the first row for all", EMBED, "(row - skipped_) * width_ + column", "column"),
    Fault("a prefix without its position", EMBED, "position(row, i, n)", "Floats{}"),
    Fault("a gradient without its scale", EMBED, "total *= load(scale + k);", "total *= all(1.0f);"),
    Fault("a gradient without the mean", EMBED, "load(shift + k) * d_bias", "all(0.0f)"),
    Fault("a kept patch at its place in the list", EMBED,
          "patches.prefix_rows() + place.position", "patches.prefix_rows() + row % patches.places()"),
    Fault("the first patch for any that is kept", PATCHES,
          "keep ? keep[rows_] : number", "keep ? int64_t{0} : number"),
    Fault("the positions of the first image for all", PATCHES, "first_place + patch", "patch"),
    Fault("no room for the prefix", PATCHES, "tokens_ += prefix_rows_;", "tokens_ += 0 * prefix_rows_;"),
    Fault("the first image for all", PATCHES, "image * images.strides[0]", "int64_t{0}"),
    Fault("pixels that are not normalised", PATCHES, "(values - load(shift + k + i)) * load(scale + k + i)", "values"),
    Fault("rows of one channel", PATCHES, "channel * images.strides[1]", "0"),
    Fault("a value of the image's last run left out", PATCHES, "load(at, count - i)", "load(at, count - i - 1)"),
    Fault("sums that start anew in each chain", PRODUCT, "s > 0", "false"),
    Fault("sums of the last block of rows alone", PRODUCT, "row > 0", "false"),
    Fault("the first block's rows in all", PRODUCT, "read(row + start + i, first, end, values[i]);",
          "read(start + i, first, end, values[i]);"),
    Fault("a panel of one value", PRODUCT, "row[k]", "row[start * VALUES]"),
    Fault("rows of the tile before", PRODUCT, "write(tile, row, count, column);",
          "write(tile, start_row, count, column);"),
    Fault("sums of the first columns in every task", PRODUCT, "task / parts * columns()", "0 * columns()"),
    Fault("sums of the first rows in every task", PRODUCT, "task % parts * tiles * TILE_ROWS", "0 * parts"),
)  # fmt: skip


def test_without_a_fault_nothing_is_wrong(found: dict[str, str]) -> None:
    assert found[""] == ""


@pytest.mark.parametrize("name", [fault.name for fault in FAULTS])
def test_a_fault_is_caught(found: dict[str, str], name: str) -> None:
    assert found[name], "not caught"
