"""Faults planted in the shipped kernels' own source: the emulation, or the comparison with float64, catches each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastvit.emulated import add_position, build, patch_embed
from fastvit.emulated.call import bank_conflicts, emulation
from fastvit.validation import plain
from fastvit.validation.cases import AddPositionCase, PatchEmbedCase, make_inputs
from fastvit.validation.tolerance import relative_error


@dataclass(frozen=True)
class Fault:
    """One change of one file of csrc/; the text to change must stand in it exactly once."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str  # a part of the message, or "value"


ADD, NUMERIC, EMBED = "add_position.h", "numeric.h", "patch_embed_forward.h"
BACKWARD = "patch_embed_backward.h"
FAULTS_OF_ADD_POSITION = (
    Fault("a piece too many", ADD, "if (index >= static_cast<int64_t>(rows) * pieces) return;", "", "outside"),
    Fault("an image too many", ADD, "first + ADD_IMAGES : p.batch;", "first + ADD_IMAGES : p.batch + 1;", "outside"),
    Fault("the next patch's position", ADD, "position = row - (", "position = row + 1 - (", "outside"),
    Fault("no position on the prefix", ADD, "if (position >= 0) load", "if (!is_prefix) load", "value"),
    Fault("prefix dropped", ADD, "table[i] += value[i];", "table[i] += 0.0f;", "value"),
    Fault("rows a place early", ADD, "* rows + row) * p.width", "* rows + row - 1) * p.width", "outside"),
    Fault("images overlap", ADD, "(image) * rows + row", "(image) * (rows - 1) + row", "second write"),
    Fault("vectors where none fit", ADD, "p.width % EIGHT == 0 && p.width_stride == 1", "true", "misaligned"),
    Fault("last row of a split dropped", ADD, "row < last; row++", "row < last - 1; row++", "value"),
    Fault("splits overlap", ADD, "p.sums + simt::block_y() * p.columns", "p.sums", "second write"),
    Fault("half of a store", NUMERIC, "to + 4 * half, words", "to + 0 * half, words", "second write"),
    Fault("values repeated", NUMERIC, "(values[2 * i], values[2 * i + 1])", "(values[2 * i], values[2 * i])", "value"),
)
# Every barrier and wait, every guard, stages, swizzle, fragments and vectors. "race" is what the shadow memory says.
SYNC = "simt::sync_threads();"
FAULTS_OF_PATCH_EMBED = (
    Fault("no barrier behind the origins", EMBED, f"first_row);\n  {SYNC}", "first_row);", "shared word"),
    Fault("no wait in the loop", EMBED, "simt::copy_wait<STAGES - 2>();", "", "in flight"),
    Fault(
        "a wait that comes short",
        EMBED,
        "simt::copy_wait<STAGES - 2>();",
        "simt::copy_wait<STAGES - 1>();",
        "in flight",
    ),
    Fault(
        "no barrier in the loop",
        EMBED,
        f"    {SYNC}\n    const bool has_more",
        "    const bool has_more",
        "shared word",
    ),
    Fault("no barrier before the sums", EMBED, f"{SYNC}\n  const bool is_wide", "const bool is_wide", "race"),
    Fault(
        "no warp barrier behind the sums",
        EMBED,
        "    simt::sync_warp();\n    SIMT_UNROLL",
        "    SIMT_UNROLL",
        "shared word",
    ),
    Fault("no warp barrier before the next sums", EMBED, "    simt::sync_warp();\n  }\n}", "  }\n}", "race"),
    Fault(
        "copies never committed",
        EMBED,
        "loader.start(writing);\n    simt::copy_commit();",
        "loader.start(writing);",
        "cop",
    ),
    Fault("a stage too early", EMBED, "writing = STAGES - 1;", "writing = STAGES - 2;", "race"),
    Fault("stages out of step", EMBED, "reading + 1 == STAGES", "reading + 2 == STAGES", ""),
    Fault("a step too few", EMBED, "(p.k_length + Tile::BK - 1) / Tile::BK", "p.k_length / Tile::BK", "value"),
    Fault(
        "swizzle of reads and writes differs",
        EMBED,
        "warp_row + lane % 16, lane / 16 * 8)",
        "warp_row + lane % 16, (lane / 16 * 8) ^ 8)",
        "value",
    ),
    Fault("swizzle ignores the row", EMBED, "(column >> 3) ^ phase", "(column >> 3) ^ (phase & 0)", "bank conflict"),
    Fault("the same fragment twice", EMBED, "b[j / 2][j % 2 * 2 + 1]", "b[j / 2][j % 2 * 2]", "value"),
    Fault("sums of the other half", EMBED, "sums[i][j] + half * 2", "sums[i][j] + 2 - half * 2", "value"),
    Fault("columns unguarded", EMBED, "column < p.width && weight_k < p.k_padded", "weight_k < p.k_padded", "outside"),
    Fault(
        "weights behind the last step",
        EMBED,
        "column < p.width && weight_k < p.k_padded",
        "column < p.width",
        "outside",
    ),
    Fault("patches unguarded", EMBED, "origin >= 0 && pixel_k < p.k_length", "pixel_k < p.k_length", "global"),
    Fault("rows unguarded", EMBED, "if (origin == NO_PATCH) continue;", "", "outside"),
    Fault("the next column of patches", EMBED, "+ x * p.stretch;", "+ (x + 1) * p.stretch;", ""),
    Fault("vectors where none fit", EMBED, "p.stretch % vector == 0 &&", "", "misaligned"),
    Fault(
        "no class token",
        EMBED,
        "return copy_prefix<Out, Tile>(p, (tile - patch_tiles) * BM, first_column);",
        "return;",
        "never written",
    ),
    Fault(
        "kept patches at the wrong position",
        EMBED,
        "patch = simt::load_element(p.keep + m);\n  float",
        "patch = place;\n  float",
        "value",
    ),
    Fault("mean and scale swapped", EMBED, "p.normaliser + p.k_padded + k", "p.normaliser + k", "value"),
)
FAULTS_OF_WEIGHT_GRADIENT = (
    Fault("no wait in the loop of dW", BACKWARD, "simt::copy_wait<STAGES - 2>();", "", "in flight"),
    Fault("no barrier in the loop of dW", BACKWARD, f"    {SYNC}\n", "", "shared word"),
    Fault("a stage of dW too early", BACKWARD, "writing = STAGES - 1;", "writing = STAGES - 2;", "race"),
    Fault(
        "last rows of a split dropped",
        BACKWARD,
        "first_row + Tile::BK - 1) / Tile::BK",
        "first_row) / Tile::BK",
        "value",
    ),
    Fault(
        "fragments of dW not transposed",
        BACKWARD,
        "simt::load_matrices_transposed(a[i]",
        "simt::load_matrices(a[i]",
        "value",
    ),
    Fault(
        "halves of dW swapped",
        BACKWARD,
        "lane / 16 * 8 + lane % 8, column",
        "lane / 8 % 2 * 8 + lane % 8, column",
        "value",
    ),
    Fault("gradient of the wrong token", BACKWARD, "f.prefix_rows + (m - image", "0 + (m - image", "value"),
    Fault(
        "columns of dW unguarded", BACKWARD, "if (column >= f.width || k >= f.k_padded) continue;", "", "second write"
    ),
    Fault("splits of dW overlap", BACKWARD, "(simt::block_y()) * f.width", "(0) * f.width", "second write"),
)
FAULTS = FAULTS_OF_ADD_POSITION + FAULTS_OF_PATCH_EMBED + FAULTS_OF_WEIGHT_GRADIENT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the builds go; the binding, which no fault touches, is taken from the usual place."""
    folder = tmp_path_factory.mktemp("faults")
    build.library()
    for path in build.cache_folder().glob("binding_*.o"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Fault, folder: Path, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    path = sources / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"stands {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new))
    with emulation(library=build.build(sources, folder, few_types=True)):
        found = _outcome()
    assert found and fault.caught_by in found, found or "not caught"


# Several tiles of rows and columns with a rest, more steps than stages, vectors and single pixels, and a selection
# of patches whose rows, unlike their distance, no vector divides.
CASES = (
    PatchEmbedCase("bfloat16", batch=4, grid=(5, 7), patch=(8, 8), channels=3, width=72, prefix=2),
    PatchEmbedCase("uint8", grid=(3, 3), patch=(7, 7), channels=5, width=63, images="uint8", normalise=True),
    PatchEmbedCase("keep", grid=(3, 2), patch=(8, 12), width=64, keep=4),
)


def test_without_a_fault_all_is_well() -> None:
    assert _outcome() == ""


def _outcome() -> str:
    """What is wrong with the kernels as they are now built; "" for nothing."""
    try:
        for dtype, width in ((torch.bfloat16, 72), (torch.float32, 72), (torch.bfloat16, 63)):
            wrong = _wrong_add_position(dtype, width)
            if wrong:
                return wrong
        for case in CASES:
            wrong = _wrong_patch_embed(case)
            if wrong:
                return wrong
    except RuntimeError as error:
        return str(error)
    return ""


def _wrong_add_position(dtype: torch.dtype, width: int) -> str:
    inputs = make_inputs(AddPositionCase("faults", batch=19, patches=5, width=width, prefix=2), dtype)
    tokens, pos_embed, prefix = (inputs.tensors[name] for name in ("tokens", "pos_embed", "prefix"))
    assert tokens is not None and pos_embed is not None and prefix is not None
    padded = torch.nn.functional.pad(tokens, (0, -width % 8))  # rows whose stride, not whose width, vectors divide
    tokens = padded[:, :, :width]
    found = add_position.forward(tokens, pos_embed, prefix, inputs.out)
    wide = torch.cat([prefix.double().expand(19, -1, -1), tokens.double()], dim=1) + pos_embed.double()
    if not torch.equal(found, wide.float().to(dtype)):
        return "value: forward"
    sums = add_position.backward(inputs.grad)
    exact = inputs.grad.double().sum(0)
    return "" if torch.allclose(sums.double(), exact, rtol=1e-5, atol=1e-5) else "value: backward"


def _wrong_patch_embed(case: PatchEmbedCase) -> str:
    inputs = make_inputs(case, torch.bfloat16)
    images, weight = inputs.tensors["images"], inputs.tensors["weight"]
    assert images is not None and weight is not None
    rest = (inputs.tensors[name] for name in ("bias", "pos_embed", "prefix"))
    found = patch_embed.forward(
        images, weight, *rest, inputs.mean, inputs.std, inputs.keep, torch.bfloat16, torch.bfloat16
    )
    wide = {name: None if t is None else t if t.dtype is torch.uint8 else t.double()
            for name, t in inputs.tensors.items()}  # fmt: skip
    truth = plain.true_patch_embed(inputs, wide)
    bound = 2 * relative_error(plain.plain_patch_embed(inputs, inputs.tensors), truth)
    if relative_error(found, truth) > bound:
        return f"value: {case.name}"
    conflicts = bank_conflicts()
    if conflicts:
        return f"{conflicts} bank conflicts"
    prefix = inputs.tensors["prefix"]
    rows = 0 if prefix is None else prefix.shape[0]
    gradient = patch_embed.weight_gradient(inputs.grad, images, weight, inputs.mean, inputs.std, inputs.keep, rows)
    wide["weight"] = wide["weight"].requires_grad_()  # type: ignore[union-attr]
    (exact,) = torch.autograd.grad(plain.true_patch_embed(inputs, wide), wide["weight"], inputs.grad.double())
    return "" if relative_error(gradient, exact) < 1e-5 else f"value: weight gradient, {case.name}"
