"""Faults in the shipped kernels' own source: how one is planted, built and seen."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvit.emulated import build
from fastvit.emulated.call import bank_conflicts, emulation
from fastvit.validation import Case, make_inputs
from fastvit.validation.runner import backend_candidate, check_inputs

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

    def is_caught_by(self, found: str) -> bool:
        """What lies outside of a row or of a tensor is another's, or nobody's: which is seen first is chance."""
        said = ("outside", "second write", "never written") if self.caught_by == "outside" else (self.caught_by,)
        return any(part in found for part in said)


Cases = tuple[tuple[Case, torch.dtype, dict[str, Any]], ...]  # with the GPU that each is for


def expect_caught(fault: Fault, cases: Cases, tmp_path: Path) -> None:
    """Build the kernels with the fault, and run the cases until one shows it."""
    sources, folder = tmp_path / "csrc", _folder()
    shutil.copytree(build.SOURCES, sources)
    path = sources / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"stands {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new))
    with emulation(library=_with_unit(sources / f"{fault.unit}.cu", folder)):
        found = _outcome(cases)
    assert fault.is_caught_by(found), found or "not caught"


class Switched:
    """All faults of one unit in one build, each an expression in place of one, or statements in place of statements: to
    compile one is what takes the time. `switch` says which of them is there, none as long as it is 0."""

    SWITCH = 'extern "C" __attribute__((visibility("default"))) int fastvit_planted = 0;\n'

    def __init__(self, faults: Sequence[Fault], tmp_path: Path) -> None:
        sources, folder = tmp_path / "csrc", _folder()
        shutil.copytree(build.SOURCES, sources)
        switched: dict[tuple[str, str], str] = {}  # several may stand in place of the same
        for number, fault in enumerate(faults, 1):
            place, is_here = (fault.file, fault.old), f"fastvit_planted == {number}"
            others = switched.get(place, fault.old)
            switched[place] = f"({is_here} ? ({fault.new}) : ({others}))"
            if fault.old.endswith(";"):
                switched[place] = f"if ({is_here}) {{ {fault.new} }} else {{ {others} }}"
        for (file, old), new in switched.items():
            path = sources / file
            text = path.read_text()
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
            path.write_text(text.replace(old, new))
        (unit,) = {fault.unit for fault in faults}
        path = sources / f"{unit}.cu"
        path.write_text(self.SWITCH + path.read_text())
        self.faults, self.library = faults, _with_unit(path, folder)
        self.switch = ctypes.c_int.in_dll(ctypes.CDLL(self.library.__file__), "fastvit_planted")

    def outcome(self, cases: Cases, fault: Fault | None = None) -> str:
        """What is wrong with the kernels, with one fault or with none; "" for nothing."""
        self.switch.value = 0 if fault is None else 1 + self.faults.index(fault)
        with emulation(library=self.library):
            return _outcome(cases)

    def expect_caught(self, fault: Fault, cases: Cases) -> None:
        """Run the cases until one shows the fault."""
        found = self.outcome(cases, fault)
        assert fault.is_caught_by(found), found or "not caught"


def expect_nothing(cases: Cases) -> None:
    """The same without a fault."""
    with emulation(library=build.build(build.units_of(build.SOURCES), _folder(), few_types=True)):
        assert _outcome(cases) == ""


def _with_unit(changed: Path, folder: Path) -> Any:
    """The kernels with one unit as it stands in a changed copy."""
    # That one first: of inline functions that several units have, the linker takes the first.
    others = [unit for unit in build.units_of(build.SOURCES) if unit.name != changed.name]
    library = build.build([changed, *others], folder, few_types=True)
    for object_file in folder.glob(f"{changed.stem}_*"):
        if object_file.name not in _unchanged(folder):
            object_file.unlink(missing_ok=True)
    return library


def _folder() -> Path:
    """Where the builds go: what no fault touches is compiled once, for all processes."""
    return build.cache_folder() / "faults"


def _unchanged(folder: Path) -> set[str]:
    return {build.object_of(unit, folder, few_types=True).name for unit in build.units_of(build.SOURCES)}


def _outcome(cases: Cases) -> str:
    """What is wrong with the kernels as they are now built; "" for nothing."""
    candidate = backend_candidate("emulated")
    bank_conflicts()  # of earlier faults
    for case, dtype, device in cases:
        with emulation(**device):
            for row in check_inputs(candidate, case.op, make_inputs(case, dtype), case.name):
                if row.status != "passed":
                    return row.reason or f"value: {row.quantity} of {case.name}"
            conflicts = bank_conflicts()
            if conflicts:
                return f"{conflicts} bank conflicts"
    return ""
