"""Faults planted in the shipped kernels' own source: the emulation, or the comparison with float64, catches each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit.emulated import build
from fastvit.emulated.call import bank_conflicts, emulation
from fastvit.validation import AddNormCase, AddPositionCase, Case, PatchEmbedCase, make_inputs
from fastvit.validation.runner import backend_candidate, check_inputs

ADD, NORM, SUMS, PREPARE, OPS = "add_position", "add_norm", "row_sums", "prepare_weight", "patch_embed"
BFLOAT16, FLOAT32, HOPPER = "patch_embed_bfloat16", "patch_embed_float32", "patch_embed_sm90a"
SYNC = "simt::sync_threads();"


@dataclass(frozen=True)
class Fault:
    """One change of one file of csrc/; the text to change must stand in it exactly once.

    It is built into one unit, the others staying as they are. `caught_by` is a part of what is said: of the emulation's
    message, or "value" where the comparison with float64 finds it. That a fault does not compile is no catch.
    """

    name: str
    unit: str
    file: str
    old: str
    new: str
    caught_by: str


# The weights that the blocks of a cluster share.
CLUSTER_FAULTS = tuple(
    Fault(name, HOPPER, "patch_embed_stream.h", old, new, caught_by)
    for name, old, new, caught_by in (
        ("weights waited for by one thread", "const { simt::mbarrier_wait(",
         "const { if (!simt::thread_index()) simt::mbarrier_wait(", "shared word"),
        ("weights of the phase before", "Memory::parity(reading)", "!Memory::parity(reading)", "deadlock"),
        ("weights over those still read", "    simt::mbarrier_wait(Memory::empty(all), Memory::parity(all));\n",
         "", "race"),
        ("weights over those of the phase before", "Memory::empty(all), Memory::parity(all)",
         "Memory::empty(all), !Memory::parity(all)", "deadlock"),
        ("the other block not told", "simt::thread_index() < CLUSTER) simt",
         "simt::thread_index() == simt::cluster_rank()) simt", "deadlock"),
        ("the other block not waited for", "Memory::empty(all), simt::thread_index())",
         "Memory::empty(all), simt::cluster_rank())", "race"),
        ("half of the bytes expected", "simt::mbarrier_expect(Memory::full(all), WEIGHT_BYTES)",
         "simt::mbarrier_expect(Memory::full(all), SHARE)", "in flight"),
        ("more bytes expected than come", "simt::mbarrier_expect(Memory::full(all), WEIGHT_BYTES)",
         "simt::mbarrier_expect(Memory::full(all), 2 * WEIGHT_BYTES)", "deadlock"),
        ("weights for the block alone", "(1 << CLUSTER) - 1", "1 << simt::cluster_rank()", "deadlock"),
        ("the other block's share", "copy_bulk(to + share", "copy_bulk(to", "race"),
        ("a share in another place", "* WEIGHT_BYTES + share;", "* WEIGHT_BYTES + SHARE - share;", "value"),
        ("mbarriers not published", "    simt::mbarrier_publish();\n", "", "mbarrier_init"),
        ("no barrier behind the mbarriers", "Memory::start_mbarriers();\n  simt::sync_cluster();",
         "Memory::start_mbarriers();\n  simt::sync_threads();", "initialised"),
        ("a block ends before the other has its weights", "  simt::sync_cluster();  // a block",
         "  // a block", "a block ends"),
        ("rows of the other block", "+ simt::cluster_rank()) * Tile::BM", ") * Tile::BM", "second write"),
    )
)  # fmt: skip

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
    # add_norm
    Fault(
        "no barrier in the sum over a row",
        NORM,
        "add_norm.h",
        f"{SYNC}\n  for (int other = first;",
        "for (int other = first;",
        "shared word",
    ),
    Fault(
        "both sums over a row in one slot",
        NORM,
        "add_norm.h",
        "sum_over_row(squares, p.lanes, 1)",
        "sum_over_row(squares, p.lanes, 0)",
        "race",
    ),
    Fault(
        "sums over rows in one slot",
        NORM,
        "add_norm.h",
        "step / p.groups % 2)",
        "0)",
        "race",
    ),
    Fault(
        "warps of another row",
        NORM,
        "add_norm.h",
        "= simt::thread_index() / lanes * (lanes / 32);",
        "= 0;",
        "value",
    ),
    Fault(
        "rows that are not there",
        NORM,
        "add_norm.h",
        "count(row < rows ? width - column : 0)",
        "count(width - column)",
        "outside",
    ),
    Fault(
        "statistics of rows that are not there",
        NORM,
        "add_norm.h",
        "if (is_row && lane == 0)",
        "if (lane == 0)",
        "second write",
    ),
    Fault(
        "columns that are not there",
        NORM,
        "numeric.h",
        "if (count <= 0) return;\n  const char*",
        "const char*",
        "outside",
    ),
    Fault(
        "columns that are not there, written",
        NORM,
        "numeric.h",
        "if (count <= 0) return;\n  char*",
        "char*",
        "outside",
    ),
    Fault(
        "the half of a store",
        NORM,
        "numeric.h",
        "(first + 16, simt::Vector<4>{{words[4]",
        "(first, simt::Vector<4>{{words[4]",
        "second write",
    ),
    Fault(
        "a value too many, loaded",
        NORM,
        "numeric.h",
        "words[i] = i < count ? simt::load_element(elements + i) : 0;",
        "words[i] = simt::load_element(elements + i);",
        "outside",
    ),
    Fault(
        "half a word too many, loaded",
        NORM,
        "numeric.h",
        "if (i < count) words[i / 2] |=",
        "words[i / 2] |=",
        "outside",
    ),
    Fault(
        "a value too many, stored",
        NORM,
        "numeric.h",
        "if (i < count) simt::store_element(elements + i, words[i]);",
        "simt::store_element(elements + i, words[i]);",
        "second write",
    ),
    Fault(
        "half a word too many, stored",
        NORM,
        "numeric.h",
        "if (i < count) simt::store_element(elements + i, static_cast",
        "simt::store_element(elements + i, static_cast",
        "second write",
    ),
    Fault(
        "the other half of a word",
        NORM,
        "numeric.h",
        "words[i / 2] >> (16 * (i % 2))",
        "words[i / 2] >> (16 * (1 - i % 2))",
        "value",
    ),
    Fault(
        "a variance of columns that are not there",
        NORM,
        "add_norm.h",
        "i < part.count ? values[i] * values[i] : 0.0f",
        "values[i] * values[i]",
        "value",
    ),
    Fault(
        "the factor of another sample",
        NORM,
        "add_norm.h",
        "is_row ? simt::load_element(p.keep + part.row / p.tokens)",
        "is_row ? simt::load_element(p.keep + part.row % p.tokens % 2)",
        "value",
    ),
    Fault(
        "the factor of another sample, backward",
        NORM,
        "add_norm.h",
        "keep = simt::load_element(p.keep + part.row / p.tokens)",
        "keep = simt::load_element(p.keep)",
        "value",
    ),
    Fault(
        "the mean of an RMS norm",
        NORM,
        "add_norm.h",
        "sum[0] / p.width * p.centre",
        "sum[0] / p.width",
        "value",
    ),
    Fault(
        "the mean of an RMS norm, backward",
        NORM,
        "add_norm.h",
        "sums[1] / p.width * p.centre",
        "sums[1] / p.width",
        "value",
    ),
    Fault(
        "a deviation for a mean",
        NORM,
        "add_norm.h",
        "{simt::load_element(p.statistics + part.row),",
        "{simt::load_element(p.statistics + p.rows + part.row),",
        "value",
    ),
    Fault(
        "the parts of other blocks left out",
        NORM,
        "add_norm.h",
        "if (other != column) add_other_part",
        "if (false) add_other_part",
        "value",
    ),
    Fault(
        "one part of a row for all blocks",
        NORM,
        "add_norm.h",
        "column = simt::block_y() * columns + first_column",
        "column = first_column",
        "second write",
    ),
    Fault(
        "rows of the next block",
        NORM,
        "add_norm.h",
        "first + p.rows_per_block < p.rows ? first + p.rows_per_block : p.rows",
        "first + p.rows_per_block",
        "outside",
    ),
    Fault(
        "partial sums in one row",
        NORM,
        "add_norm.h",
        "static_cast<int64_t>(simt::block_x()) * p.vectors",
        "static_cast<int64_t>(0) * p.vectors",
        "second write",
    ),
    Fault(
        "no barrier before the block's sums",
        NORM,
        "add_norm.h",
        "simt::sync_threads();  // what lay there has been read",
        "",
        "race",
    ),
    Fault(
        "no barrier behind the block's sums",
        NORM,
        "add_norm.h",
        f"{SYNC}\n  if (thread >= p.lanes) return;",
        "if (thread >= p.lanes) return;",
        "shared word",
    ),
    Fault(
        "sums of the first group alone",
        NORM,
        "add_norm.h",
        "other < p.lanes * p.groups; other += p.lanes",
        "other < p.lanes; other += p.lanes",
        "value",
    ),
    Fault(
        "sums side by side",
        NORM,
        "add_norm.h",
        "16 * (i / 4 * NORM_THREADS + thread)",
        "16 * (2 * thread + i / 4)",
        "bank conflict",
    ),
    Fault(
        "the bias left out of the scale's gradient",
        NORM,
        "add_norm.h",
        "d_scale[i] += d_change[i] * bias[i];",
        "",
        "value",
    ),
    Fault(
        "the bias's gradient unscaled",
        NORM,
        "add_norm.h",
        "d_change[i] *= scale[i];",
        "",
        "value",
    ),
    Fault(
        "no barrier in the last sum",
        NORM,
        "add_norm.h",
        f"{SYNC}\n  if (warp > 0",
        "if (warp > 0",
        "shared word",
    ),
    Fault(
        "the last partial sum dropped",
        NORM,
        "add_norm.h",
        "(p.rows - warp + WARPS - 1) / WARPS",
        "(p.rows - warp) / WARPS",
        "value",
    ),
    Fault(
        "columns of partial sums that are not there",
        NORM,
        "add_norm.h",
        "if (column < p.columns) {",
        "if (true) {",
        "outside",
    ),
    Fault(
        "sums that are not there",
        NORM,
        "add_norm.h",
        "if (warp > 0 || column >= p.columns) return;",
        "if (warp > 0) return;",
        "outside",
    ),
    Fault(
        "16 bytes where none fit",
        NORM,
        "add_norm.cu",
        "return width % EIGHT == 0 &&",
        "return width > 0 &&",
        "misaligned",
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
        "loader.start(place(writing));\n      simt::copy_commit();",
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
    Fault("rows unguarded", BFLOAT16, "patch_embed_forward.h", "if (origin != NO_PATCH) put", "put", "outside"),
    Fault(
        "no class token",
        BFLOAT16,
        "patch_embed_forward.h",
        "if (is_wide) return copy_prefix<EIGHT, Tile>(p, first_row, first_column);",
        "return;",
        "never written",
    ),
    Fault(
        "kept patches at the wrong position",
        BFLOAT16,
        "patch_embed_forward.h",
        "if (!pixels.keep) {",
        "if (true) {",
        "value",
    ),
    Fault("scale dropped", BFLOAT16, "patch_embed_forward.h", "sums[i] * p.scale;", "sums[i];", "value"),
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
        "load_piece(p.normaliser + k, shift)",
        "load_piece(p.normaliser + p.k_padded + k, shift)",
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
    Fault("the same 16 values again", HOPPER, "products.h", "operand(first + step)", "operand(first)", "value"),
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
    Fault(
        "origins of the next tile not noted",
        HOPPER,
        "patch_embed_stream.h",
        "tile + order.clusters < order.count",
        "false",
        "never written",
    ),
    Fault(
        "origins of the next tile in the place of this one's",
        HOPPER,
        "patch_embed_stream.h",
        "Memory::origins(0) + Memory::origins(1) - this->origins",
        "Memory::origins(0)",
        "race",
    ),
    Fault("columns of the first tile", HOPPER, "patch_embed_stream.h", "(order.column(tile) * steps", "(0", "value"),
    Fault("a tile too far", HOPPER, "patch_embed_stream.h", "loader.tile - order.clusters;", "loader.tile;", "outside"),
    Fault(
        "sums over loads",
        HOPPER,
        "patch_embed_stream.h",
        "simt::shared_base() + Memory::SLABS",
        "simt::shared_base()",
        "race",
    ),
    Fault(
        "short tiles one after another",
        HOPPER,
        "patch_embed_sm90a.cu",
        "is_short ? tiles : std",
        "std",
        "never written",
    ),
    Fault("warpgroup's barrier removed", HOPPER, "pipeline.h", f"    {SYNC}\n", "", "wgmma reads"),
    # The cluster's weights
    *CLUSTER_FAULTS,
    Fault("weights not waited for", HOPPER, "pipeline.h", "loader.await(step);", "", "shared word"),
    Fault(
        "rows of weights for tiles",
        OPS,
        "patch_embed.cu",
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
        "patch_embed.cu",
        'queue.scratch<float>("table", static_cast<int64_t>(prefix_rows + p.patches) * p.width)',
        'queue.scratch<float>("table", static_cast<int64_t>(p.patches) * p.width)',
        "outside",
    ),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the builds go: what no fault touches is compiled once, for all processes."""
    return build.cache_folder() / "faults"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, folder: Path, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    path = sources / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"stands {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new))
    # First the unit with the fault: of inline functions that several units have, the linker takes the first.
    others = [unit for unit in build.units_of(build.SOURCES) if unit.stem != fault.unit]
    library = build.build([sources / f"{fault.unit}.cu", *others], folder, few_types=True)
    for object_file in folder.glob(f"{fault.unit}_*"):
        if object_file.name not in _unchanged(folder):
            object_file.unlink(missing_ok=True)
    with emulation(library=library):
        found = _outcome(fault.unit)
    assert found and fault.caught_by in found, found or "not caught"


def _unchanged(folder: Path) -> set[str]:
    return {build.object_of(unit, folder, few_types=True).name for unit in build.units_of(build.SOURCES)}


def test_without_a_fault_all_is_well(folder: Path) -> None:
    with emulation(library=build.build(build.units_of(build.SOURCES), folder, few_types=True)):
        for unit in CASES:
            assert _outcome(unit) == ""


LARGE = {"processors": 1}
# Several tiles of rows and columns with a rest, more steps than stages, vectors and single pixels, and a selection
# of patches whose rows, unlike their distance, no vector divides.
BFLOAT16_CASES: tuple[tuple[Case, torch.dtype, dict[str, Any]], ...] = (
    (PatchEmbedCase("tiles", batch=4, grid=(5, 7), patch=(8, 8), width=72, prefix=2), torch.bfloat16, {}),
    (PatchEmbedCase("single", grid=(3, 3), patch=(7, 7), channels=5, width=63, images="uint8", normalise=True,
                    layout="cropped"), torch.bfloat16, {}),
    (PatchEmbedCase("keep", grid=(3, 2), patch=(8, 12), width=64, keep=4, repeat_keep=True, normalise=True),
     torch.bfloat16, {}),
    (PatchEmbedCase("large", batch=3, grid=(4, 5), patch=(8, 8), width=136), torch.bfloat16, LARGE),
    (PatchEmbedCase("splits", batch=5, grid=(8, 8), patch=(4, 4), channels=1, width=8), torch.bfloat16, {}),
)  # fmt: skip
HOPPER_CASES: tuple[tuple[Case, torch.dtype, dict[str, Any]], ...] = (
    (PatchEmbedCase("warpgroups", batch=4, grid=(7, 7), patch=(8, 8), channels=7, width=200, images="uint8",
                    normalise=True), torch.bfloat16, {"processors": 1, "capability": 90}),
    (PatchEmbedCase("short", batch=4, grid=(7, 7), patch=(8, 8), channels=1, width=200, images="uint8"),
     torch.bfloat16, {"processors": 1, "capability": 90}),
)  # fmt: skip
CASES: dict[str, tuple[tuple[Case, torch.dtype, dict[str, Any]], ...]] = {
    ADD: tuple(
        (AddPositionCase("rows", batch=19, patches=5, width=width, prefix=2, layout=layout), dtype, {})
        for dtype, width, layout in (
            (torch.bfloat16, 72, "contiguous"), (torch.float32, 72, "contiguous"), (torch.float32, 72, "from_nchw"),
            (torch.bfloat16, 63, "sliced_rows")
        )
    ),
    NORM: tuple(
        (case, torch.bfloat16, {})
        for case in (
            AddNormCase("parts", tokens=1, width=2056, stream="float32", parameters="mixed"),
            AddNormCase("single", tokens=5, width=63, stream="float32", parameters="mixed", scale=True),
            AddNormCase("whole", tokens=17, width=384, rms=True),
            AddNormCase("scaled", batch=4, tokens=3, width=264, stream="float32", parameters="mixed", scale=True,
                        keep=True),
            # A block takes several rows, one after another.
            AddNormCase("steps", batch=1, tokens=1060, width=264, scale=True),
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


def _outcome(unit: str) -> str:
    """What is wrong with the kernels as they are now built; "" for nothing."""
    candidate = backend_candidate("emulated")
    bank_conflicts()  # of earlier faults
    for case, dtype, device in CASES[unit]:
        with emulation(**device):
            for row in check_inputs(candidate, case.op, make_inputs(case, dtype), case.name):
                if row.status != "passed":
                    return row.reason or f"value: {row.quantity} of {case.name}"
            conflicts = bank_conflicts()
            if conflicts:
                return f"{conflicts} bank conflicts"
    return ""
