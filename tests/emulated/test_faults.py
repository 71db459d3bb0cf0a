"""Faults planted in the shipped kernels' own source: the emulation, or the comparison with float64, catches each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvit.validation import AddPositionCase, PatchEmbedCase
from tests.emulated.planted import SYNC, Cases, Fault, expect_caught, expect_nothing

ADD, SUMS, PREPARE, OPS = "add_position", "row_sums", "prepare_weight", "patch_embed"
BFLOAT16, FLOAT32, HOPPER = "patch_embed_bfloat16", "patch_embed_float32", "patch_embed_sm90a"

FAULTS = (
    # The row kernels
    Fault(
        "a piece too many",
        ADD,
        "add_position.h",
        "if (index >= static_cast<int64_t>(rows) * pieces) return;",
        "",
        "outside",
    ),
    Fault(
        "an image too many",
        ADD,
        "add_position.h",
        "first + ADD_IMAGES : p.batch;",
        "first + ADD_IMAGES : p.batch + 1;",
        "outside",
    ),
    Fault(
        "the next patch's position", ADD, "add_position.h", "position = row - (", "position = row + 1 - (", "outside"
    ),
    Fault(
        "no position on the prefix", ADD, "add_position.h", "if (position >= 0) load", "if (!is_prefix) load", "value"
    ),
    Fault("prefix dropped", ADD, "add_position.h", "table[i] += value[i];", "table[i] += 0.0f;", "value"),
    Fault(
        "images overlap", ADD, "add_position.h", "(image) * rows + row", "(image) * (rows - 1) + row", "second write"
    ),
    Fault(
        "vectors where none fit",
        ADD,
        "add_position.cu",
        "is_wide = p.width % EIGHT == 0 &&",
        "is_wide = p.width ? true :",
        "misaligned",
    ),
    Fault("half of a store", ADD, "numeric.h", "to + 4 * part, words", "to + 0 * part, words", "second write"),
    Fault(
        "values repeated",
        ADD,
        "numeric.h",
        "(values[2 * i], values[2 * i + 1])",
        "(values[2 * i], values[2 * i])",
        "value",
    ),
    Fault(
        "last row of a split dropped",
        SUMS,
        "row_sums.h",
        "row < rows; row += AHEAD",
        "row < rows - 1; row += AHEAD",
        "value",
    ),
    Fault(
        "splits of sums overlap", SUMS, "row_sums.h", "p.sums + simt::block_y() * p.columns", "p.sums", "second write"
    ),
    Fault("rows of another key", SUMS, "row_sums.h", "== key) found", "!= key) found", "value"),
    Fault(
        "no barrier behind the biases",
        PREPARE,
        "prepare_weight.h",
        f"{SYNC}\n\n  // Threads",
        "\n  // Threads",
        "shared word",
    ),
    Fault(
        "no barrier in the transposition", PREPARE, "prepare_weight.h", f"{SYNC}\n\n  SIMT", "\n  SIMT", "shared word"
    ),
    Fault(
        "the bias corrected from the unrounded weight",
        PREPARE,
        "prepare_weight.h",
        "simt::to_float(rounded) * shift[i];",
        "scaled[i] * shift[i];",
        "value",
    ),
    # The pipeline of all products
    Fault("no wait", BFLOAT16, "pipeline.h", "simt::copy_wait<AHEAD - 1>();", "", "in flight"),
    Fault(
        "a wait that comes short",
        BFLOAT16,
        "pipeline.h",
        "simt::copy_wait<AHEAD - 1>();",
        "simt::copy_wait<AHEAD>();",
        "in flight",
    ),
    Fault("no barrier in the loop", BFLOAT16, "pipeline.h", f"    {SYNC}\n", "", "shared word"),
    Fault(
        "no barrier behind the loop",
        BFLOAT16,
        "pipeline.h",
        f"simt::copy_wait<0>();\n  {SYNC}",
        "simt::copy_wait<0>();",
        "race",
    ),
    Fault(
        "copies never committed",
        BFLOAT16,
        "pipeline.h",
        "loader.start(place(writing));\n    simt::copy_commit();",
        "loader.start(place(writing));",
        "cop",
    ),
    Fault("a stage too early", BFLOAT16, "pipeline.h", "writing = AHEAD;", "writing = AHEAD - 1;", "race"),
    Fault("stages out of step", BFLOAT16, "pipeline.h", "reading + 1 == STAGES", "reading + 2 == STAGES", "in flight"),
    Fault("swizzle ignores the row", BFLOAT16, "pipeline.h", ": row & 7;", ": row & 0;", "bank conflict"),
    Fault(
        "swizzle of reads and writes differs",
        BFLOAT16,
        "products.h",
        "lane % 16, lane / 16 * 16)",
        "lane % 16, (lane / 16 * 16) ^ 16)",
        "value",
    ),
    # The forward product
    Fault(
        "the same fragment twice",
        BFLOAT16,
        "products.h",
        "const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {\n  if constexpr",
        "const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {\n  b1 = b0;\n  if constexpr",
        "value",
    ),
    Fault(
        "no barrier behind the origins",
        BFLOAT16,
        "patch_embed_forward.h",
        f"{SYNC}\n  ForwardLoader",
        "ForwardLoader",
        "shared word",
    ),
    Fault(
        "no warp barrier behind the sums",
        BFLOAT16,
        "patch_embed_forward.h",
        "    simt::sync_warp();\n    SIMT_UNROLL",
        "    SIMT_UNROLL",
        "shared word",
    ),
    Fault(
        "no warp barrier before the next sums",
        BFLOAT16,
        "patch_embed_forward.h",
        "    simt::sync_warp();\n  }\n}",
        "  }\n}",
        "race",
    ),
    Fault(
        "a step too few",
        BFLOAT16,
        "patch_embed_forward.h",
        "(p.k_length + Tile::BK - 1) / Tile::BK",
        "p.k_length / Tile::BK",
        "value",
    ),
    Fault(
        "sums of the other half",
        BFLOAT16,
        "patch_embed_forward.h",
        "first_column / 8 + j] + part * 2",
        "first_column / 8 + j] + 2 - part * 2",
        "value",
    ),
    Fault(
        "halves not swapped back",
        BFLOAT16,
        "patch_embed_forward.h",
        "(swap ? second.word[e] : first",
        "(swap ? first.word[e] : first",
        "value",
    ),
    Fault(
        "all lanes begin with the same half",
        BFLOAT16,
        "patch_embed_forward.h",
        "swap = lane / 4 % 2;",
        "swap = 0;",
        "bank conflict",
    ),
    Fault(
        "columns unguarded",
        BFLOAT16,
        "patch_embed_forward.h",
        "row < weight.rows && weight_k < weight.length",
        "weight_k < weight.length",
        "outside",
    ),
    Fault(
        "weights behind the last step",
        BFLOAT16,
        "patch_embed_forward.h",
        "row < weight.rows && weight_k < weight.length",
        "row < weight.rows",
        "outside",
    ),
    Fault(
        "rows unguarded",
        BFLOAT16,
        "patch_embed_forward.h",
        "    if (row >= patch_rows<PACKED>(p.pixels)) return;\n",
        "",
        "outside",
    ),
    Fault(
        "no class token",
        BFLOAT16,
        "patch_embed_forward.h",
        "if (is_wide) return copy_prefix<EIGHT, Tile, THREADS, PACKED>(p, first_row, first_column);",
        "return;",
        "never written",
    ),
    Fault(
        "kept patches at the wrong position",
        BFLOAT16,
        "patch_embed_forward.h",
        "pixels.keep ? simt::load_element(pixels.keep + m)",
        "!pixels.keep ? int64_t{0}",
        "value",
    ),
    Fault("scale dropped", BFLOAT16, "patch_embed_forward.h", "+= sums[i] * p.scale;", "+= sums[i];", "value"),
    # Patches
    Fault("patches unguarded", BFLOAT16, "patches.h", "origin >= 0 && k < p.k_length", "k < p.k_length", "global"),
    Fault(
        "the next column of patches",
        BFLOAT16,
        "patches.h",
        "static_cast<int64_t>(x) * p.stretch",
        "static_cast<int64_t>(x + 1) * p.stretch",
        "outside",
    ),
    Fault(
        "a row of the patch repeated",
        BFLOAT16,
        "patches.h",
        "if (value >= p.stretch) value -= p.stretch, row++;",
        "if (value >= p.stretch) value -= p.stretch;",
        "value",
    ),
    Fault(
        "vectors of pixels where none fit",
        BFLOAT16,
        "patch_embed_launch.h",
        "p.stretch % vector == 0 &&",
        "",
        "misaligned",
    ),
    Fault(
        "mean and scale swapped",
        FLOAT32,
        "patches.h",
        "load_piece(p.normaliser + k, found.shift)",
        "load_piece(p.normaliser + p.k_padded + k, found.shift)",
        "value",
    ),
    # float32
    Fault(
        "a value of four dropped",
        FLOAT32,
        "products.h",
        "for (int q = 0; q < 4; q++)",
        "for (int q = 0; q < 3; q++)",
        "value",
    ),
    Fault(
        "rows of another lane",
        FLOAT32,
        "products.h",
        "swizzled<ROW_BYTES>(Tile::warp_row() + lane / 4, 0)",
        "swizzled<ROW_BYTES>(Tile::warp_row() + lane % 8, 0)",
        "value",
    ),
    Fault(
        "columns of the gradient shifted",
        FLOAT32,
        "products.h",
        "first = (Tile::warp_row() + lane / 4) * 4",
        "first = (Tile::warp_row() + (lane / 4 ^ 1)) * 4",
        "value",
    ),
    Fault(
        "TF32 where it was not asked for",
        FLOAT32,
        "patch_embed_instances.h",
        "if (!tf32) return launch_forward_tile",
        "if (false) return launch_forward_tile",
        "value",
    ),
    # Warpgroups
    Fault(
        "not published",
        HOPPER,
        "products.h",
        "publish() { simt::publish_shared(); }",
        "publish() {}",
        "fence.proxy.async",
    ),
    Fault("accumulators not announced", HOPPER, "products.h", "simt::warpgroup_arrive();", "", "wgmma"),
    Fault("not waited for", HOPPER, "products.h", "simt::warpgroup_wait<IN_FLIGHT>(sums[0]);", "", "while a wgmma"),
    Fault("the last not waited for", HOPPER, "products.h", "simt::warpgroup_wait<0>(sums[0]);", "", "wgmma"),
    Fault("never committed", HOPPER, "products.h", "simt::warpgroup_commit();", "", "while a wgmma"),
    Fault(
        "rows of the other warpgroup",
        HOPPER,
        "products.h",
        "simt::thread_index() / 128 * Tile::PANEL_BYTES",
        "0",
        "value",
    ),
    Fault("the same 16 values again", HOPPER, "products.h", "sums[0], a + step / 16", "sums[0], a", "value"),
    Fault(
        "columns taken for rows",
        HOPPER,
        "products.h",
        "warpgroup_multiply_add<Compute, BY_COLUMNS>",
        "warpgroup_multiply_add<Compute>",
        "in flight",  # such products leave their stage
    ),
    Fault(
        "panels of half the length",
        HOPPER,
        "products.h",
        "matrix_descriptor(start, Tile::PANEL_BYTES)",
        "matrix_descriptor(start, Tile::PANEL_BYTES / 2)",
        "value",
    ),
    Fault(
        "loads into the place of a product in flight",
        HOPPER,
        "pipeline.h",
        "STAGES - 1 - Product::IN_FLIGHT",
        "STAGES - 1",
        "while a wgmma",
    ),
    Fault("warpgroup's barrier removed", HOPPER, "pipeline.h", f"    {SYNC}\n", "", "shared word"),
    # Tiles of weights
    Fault(
        "rows of weights for tiles",
        OPS,
        "patch_embed_problem.h",
        "p.in_tiles = has_stream(",
        "p.in_tiles = false && has_stream(",
        "outside",
    ),
    Fault(
        "tiles of weights unswizzled", PREPARE, "prepare_weight.h", "(d % ROWS, k %", "(0 * ROWS, k %", "second write"
    ),
    Fault(
        "tiles of weights by columns",
        PREPARE,
        "prepare_weight.h",
        "static_cast<int64_t>(d - d % ROWS) * p.weight_length",
        "int64_t{0} * p.weight_length",
        "second write",
    ),
    # The weight's gradient
    Fault(
        "fragments not transposed",
        BFLOAT16,
        "products.h",
        "load_matrices_transposed(a, stage",
        "load_matrices(a, stage",
        "value",
    ),
    Fault(
        "halves of a fragment swapped",
        BFLOAT16,
        "products.h",
        "depth + lane / 16 * 8 + lane % 8, byte",
        "depth + lane / 8 % 2 * 8 + lane % 8, byte",
        "value",
    ),
    Fault(
        "last rows of a split dropped",
        BFLOAT16,
        "patch_embed_weight_gradient.h",
        "p.rows_per_split) + Tile::BK - 1) / Tile::BK",
        "p.rows_per_split)) / Tile::BK",
        "value",
    ),
    Fault(
        "columns of the gradient unguarded",
        BFLOAT16,
        "patch_embed_weight_gradient.h",
        "if (column >= p.width || k >= k_padded) continue;",
        "",
        "outside",
    ),
    Fault(
        "splits overlap",
        BFLOAT16,
        "patch_embed_weight_gradient.h",
        "(simt::block_y()) * p.width * k_padded",
        "(0) * p.width * k_padded",
        "second write",
    ),
    Fault(
        "gradients of missing patches",
        BFLOAT16,
        "patch_embed_weight_gradient.h",
        "column < p.width && noted(tile_row, 0) >= 0",
        "column < p.width",
        "outside",
    ),
    Fault(
        "rows noted a step late",
        BFLOAT16,
        "patch_embed_weight_gradient.h",
        "note_row(next_slot() * Tile::BK",
        "note_row(slot * Tile::BK",
        "race",
    ),
    Fault(
        "no barrier behind the first rows",
        BFLOAT16,
        "patch_embed_weight_gradient.h",
        f"{SYNC}\n  Product product;",
        "Product product;",
        "shared word",
    ),
    # The image's gradient
    Fault(
        "tokens of another row",
        BFLOAT16,
        "patches.h",
        "(p.over_kept.quotient(m)) + 1) * prefix_rows",
        "(p.over_kept.quotient(m)) + 0) * prefix_rows",
        "second write",
    ),
    Fault(
        "pixels unscaled",
        BFLOAT16,
        "patch_embed_forward.h",
        "sums[e] * simt::load_element(p.scale + k)",
        "sums[e]",
        "value",
    ),
    Fault(
        "pixels behind the patch",
        BFLOAT16,
        "patch_embed_forward.h",
        "first_column + column + e < target.k_length",
        "true",
        "outside",
    ),
    # What the ops make of their arguments
    Fault(
        "prefix rows taken for gradients",
        OPS,
        "patch_embed.cu",
        "static_cast<int64_t>(prefix_rows) * problem.width * bytes_of(grad.type);",
        "0;",
        "value",
    ),
    Fault(
        "gradients of patches not gathered",
        OPS,
        "patch_embed.cu",
        "sum.prefix_rows = prefix_rows, sum.width",
        "sum.prefix_rows = 0, sum.width",
        "value",
    ),
    Fault(
        "the mean's part of the weight's gradient",
        OPS,
        "patch_embed.cu",
        "has_mean ? d_bias : nullptr",
        "nullptr",
        "value",
    ),
    Fault(
        "a table too short",
        OPS,
        "patch_embed_problem.h",
        'queue.scratch<float>("table", static_cast<int64_t>(prefix_rows + p.patches) * p.width)',
        'queue.scratch<float>("table", static_cast<int64_t>(p.patches) * p.width)',
        "outside",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    expect_caught(fault, CASES[fault.unit], tmp_path)


def test_without_a_fault_all_is_well() -> None:
    for cases in CASES.values():
        expect_nothing(cases)


LARGE = {"processors": 1}
# Several tiles of rows and columns with a rest, more steps than stages, vectors and single pixels, and a selection
# of patches whose rows, unlike their distance, no vector divides.
BFLOAT16_CASES: Cases = (
    (PatchEmbedCase("tiles", batch=4, grid=(5, 7), patch=(8, 8), width=72, prefix=2), torch.bfloat16, {}),
    (PatchEmbedCase("single", grid=(3, 3), patch=(7, 7), channels=5, width=63, images="uint8", normalise=True,
                    layout="cropped"), torch.bfloat16, {}),
    (PatchEmbedCase("keep", grid=(3, 2), patch=(8, 12), width=64, keep=4, repeat_keep=True, normalise=True),
     torch.bfloat16, {}),
    (PatchEmbedCase("large", batch=3, grid=(4, 5), patch=(8, 8), width=136), torch.bfloat16, LARGE),
    (PatchEmbedCase("splits", batch=5, grid=(8, 8), patch=(4, 4), channels=1, width=8), torch.bfloat16, {}),
)  # fmt: skip
HOPPER_CASES: Cases = (
    (PatchEmbedCase("warpgroups", batch=4, grid=(7, 7), patch=(8, 8), channels=7, width=200, images="uint8",
                    normalise=True), torch.bfloat16, {"processors": 1, "capability": 90}),
    # So many tiles of the weight's gradient that their rows are not split: more steps than stages.
    (PatchEmbedCase("steps", batch=11, patch=(8, 8), channels=29, grid=(5, 6), width=1160, prefix=0), torch.bfloat16,
     {"processors": 1, "capability": 90}),
)  # fmt: skip
CASES: dict[str, Cases] = {
    ADD: tuple(
        (AddPositionCase("rows", batch=19, patches=5, width=width, prefix=2, layout=layout), dtype, {})
        for dtype, width, layout in (
            (torch.bfloat16, 72, "contiguous"), (torch.float32, 72, "contiguous"), (torch.float32, 72, "from_nchw"),
            (torch.bfloat16, 63, "sliced_rows")
        )
    ),
    BFLOAT16: BFLOAT16_CASES,
    OPS: (*BFLOAT16_CASES, HOPPER_CASES[0]),
    SUMS: BFLOAT16_CASES,
    PREPARE: (*BFLOAT16_CASES, HOPPER_CASES[0]),
    FLOAT32: (
        (PatchEmbedCase("fma", batch=4, grid=(5, 7), patch=(4, 4), width=72, prefix=2), torch.float32, {}),
        (PatchEmbedCase("raw", grid=(3, 3), patch=(7, 7), width=63, images="uint8", normalise=True), torch.float32, {}),
    ),
    HOPPER: HOPPER_CASES,
}  # fmt: skip
