"""Faults planted in the shipped kernels' own source: the emulation, or the comparison with float64, catches each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastvit.emulated import add_position, build
from fastvit.emulated.call import emulation
from fastvit.validation.cases import AddPositionCase, make_inputs


@dataclass(frozen=True)
class Fault:
    """One change of one file of csrc/; the text to change must stand in it exactly once."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str  # a part of the message, or "value"


ADD, NUMERIC = "add_position.h", "numeric.h"
FAULTS = (
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
)  # fmt: skip


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
    with emulation(library=build.build(sources, folder)):
        found = _outcome()
    assert fault.caught_by in found, found or "not caught"


def test_without_a_fault_all_is_well() -> None:
    assert _outcome() == ""


def _outcome() -> str:
    """What is wrong with the kernels as they are now built; "" for nothing."""
    try:
        for dtype, width in ((torch.bfloat16, 72), (torch.float32, 72), (torch.bfloat16, 63)):
            wrong = _wrong(dtype, width)
            if wrong:
                return wrong
    except RuntimeError as error:
        return str(error)
    return ""


def _wrong(dtype: torch.dtype, width: int) -> str:
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
